"""Every line of the doctor: the good one, and each that warns or fails."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet

import fluxcompile
from fluxcompile import backend as flux_backend
from fluxcompile.doctor import Finding, Status, caches, entry_point, gpu, toolchain, versions


def expect(finding: Finding, status: Status, found: str, advice: str = "") -> None:
    assert (finding.status, found in finding.found, advice in finding.advice) == (
        *(status, True, True),
    ), finding


def absent(*_):
    raise metadata.PackageNotFoundError("nothing")


class TestVersions:
    def test_what_is_installed_is_well(self):
        checks = [versions.own_version(), versions.python_version()]
        checks += [versions.package_version(name) for name in ("torch", "transformers")]
        assert [c.status for c in checks[:2]] == [Status.OK, Status.OK]
        assert all(c.status is not Status.FAIL for c in checks)
        assert metadata.version("torch") in checks[2].found

    def test_the_range_is_the_installed_packages_own(self):
        assert str(versions._range_of("torch")) == ">=2.11"
        assert str(versions.triton_range()) == ">=3.6"
        assert str(versions._range_of("no such package")) == ""

    @pytest.mark.parametrize(
        ("version", "status"),
        [
            ("2.10.1", Status.FAIL),
            ("2.11.0+cu130", Status.OK),
            ("2.13.9", Status.OK),
            ("2.14.0", Status.WARN),
            ("2.14.0.dev20261101", Status.WARN),
            ("3.0", Status.WARN),
        ],
    )
    def test_older_and_newer_versions(self, version, status):
        finding = versions.judge("torch", version, SpecifierSet(">=2.11"))
        assert finding.status is status
        assert version in finding.found
        if status is not Status.OK:
            assert "pip install" in finding.advice

    def test_a_package_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(metadata, "version", absent)
        expect(versions.package_version("torch"), Status.FAIL, "not installed", '"torch>=2.11"')
        expect(versions.own_version(), Status.FAIL, "is not installed", "pip install fluxcompile")

    def test_nothing_else_stops_where_this_package_is_not_installed(self, monkeypatch):
        version = metadata.version
        for name in ("requires", "metadata"):
            monkeypatch.setattr(metadata, name, absent)
        monkeypatch.setattr(
            metadata, "version", lambda name: absent() if name == "fluxcompile" else version(name)
        )
        expect(versions.own_version(), Status.FAIL, "is not installed")
        assert versions.package_version("torch").status is not Status.FAIL
        assert versions.python_version().status is Status.OK

    def test_a_second_copy_of_this_package(self, monkeypatch):
        monkeypatch.setattr(fluxcompile, "__version__", "0.0.9")
        expect(versions.own_version(), Status.FAIL, "0.0.9 runs", "second copy")

    def test_an_old_python(self, monkeypatch):
        monkeypatch.setattr(versions.platform, "python_version", lambda: "3.10.4")
        expect(versions.python_version(), Status.FAIL, "3.10.4, not >=3.11", "Python >=3.11")


class TestTriton:
    def test_compiling(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert toolchain.triton().status is not Status.FAIL

    @pytest.mark.parametrize(("has_gpu", "status"), [(False, Status.WARN), (True, Status.FAIL)])
    def test_missing(self, monkeypatch, has_gpu, status):
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        expect(toolchain.triton(), status, "cannot be imported", "fluxcompile[gpu]")

    def test_an_old_one(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.1.0"))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        expect(toolchain.triton(), Status.FAIL, "3.1.0, expected >=3.6", "pip install")

    def test_the_interpreter(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        expect(toolchain.triton(), Status.WARN, "interpreted", "unset TRITON_INTERPRET")


class TestCompiler:
    def test_one_that_cxx_names(self, monkeypatch, tmp_path):
        mine = tmp_path / "my-c++"
        mine.write_text("#!/bin/sh\n")
        mine.chmod(0o755)
        monkeypatch.setenv("CXX", str(mine))
        expect(toolchain.compiler(), Status.OK, str(mine))
        monkeypatch.setenv("PATH", "")
        assert toolchain.has_compiler()

    def test_none(self, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
        expect(toolchain.compiler(), Status.FAIL, "is on PATH", "install g++")
        assert not toolchain.has_compiler()


def card(major: int, name: str = "A GPU") -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=0, total_memory=80 * 2**30)


class TestGPU:
    @pytest.fixture
    def machine(self, monkeypatch):
        """A machine of the given kind."""

        def make(cards=(), driver=None, cuda="13.0"):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
            monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
            monkeypatch.setattr(torch.version, "cuda", cuda)
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            monkeypatch.setattr(gpu, "driver_version", lambda: driver)

        return make

    def test_none(self, machine):
        machine(cuda=None)
        expect(gpu.gpu(), Status.OK, "none")

    def test_two(self, machine):
        machine([card(9), card(8, "Other")], driver="580.1")
        text = "A GPU, capability 9.0, 80 GiB; Other, capability 8.0, 80 GiB; driver 580.1, CUDA"
        expect(gpu.gpu(), Status.OK, text)

    def test_too_old(self, machine):
        machine([card(9), card(7, "Old")], driver="580.1")
        expect(gpu.gpu(), Status.WARN, "Old, capability 7.0", "Old: use a GPU of capability 8.0")

    @pytest.mark.parametrize("hidden", ["", "-1"])
    def test_hidden_on_purpose(self, machine, monkeypatch, hidden):
        machine(driver="580.1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        expect(gpu.gpu(), Status.WARN, "hidden by CUDA_VISIBLE_DEVICES", "unset")

    def test_torch_without_cuda(self, machine):
        machine(driver="580.1", cuda=None)
        expect(gpu.gpu(), Status.WARN, "driver 580.1", "CUDA build of torch")

    def test_torch_that_cannot_use_it(self, machine):
        machine(driver="470.1", cuda="13.0")
        expect(gpu.gpu(), Status.FAIL, "CUDA 13.0 cannot use it", "update the driver")


class TestDriver:
    @pytest.mark.parametrize(
        ("script", "version"),
        [("echo 580.1; echo 580.1", "580.1"), ("echo no devices >&2; exit 6", None), ("", None)],
        ids=["two GPUs", "none", "silent"],
    )
    def test_what_nvidia_smi_says(self, monkeypatch, tmp_path, script, version):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert gpu.driver_version() == version

    def test_no_nvidia_smi(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert gpu.driver_version() is None

    def test_one_that_hangs(self, monkeypatch):
        def hang(*_, **given):
            raise subprocess.TimeoutExpired("nvidia-smi", given["timeout"])

        monkeypatch.setattr(gpu.shutil, "which", lambda _: "/bin/nvidia-smi")
        monkeypatch.setattr(subprocess, "run", hang)
        assert gpu.driver_version() is None


class TestCaches:
    @pytest.mark.parametrize(
        ("check", "variable"),
        [
            (caches.inductor_cache, "TORCHINDUCTOR_CACHE_DIR"),
            (caches.triton_cache, "TRITON_CACHE_DIR"),
        ],
    )
    def test_where_and_how_big(self, monkeypatch, tmp_path, check, variable):
        monkeypatch.setattr(caches, "LEAST_FREE", 0)
        folder = tmp_path / "deep" / "cache"
        monkeypatch.setenv(variable, str(folder))
        expect(check(), Status.OK, f"{folder}: not made yet")
        assert not folder.exists()
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "code").write_bytes(bytes(3 * 2**20))
        expect(check(), Status.OK, f"{folder}: 3.0 MiB")

    def test_by_default_they_are_where_inductor_and_triton_put_them(self, monkeypatch, tmp_path):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        monkeypatch.setenv("TRITON_HOME", str(tmp_path))
        assert "torchinductor" in caches.inductor_folder().name
        assert caches.triton_folder() == tmp_path / ".triton" / "cache"

    def test_not_writable(self, monkeypatch, tmp_path):
        # Whoever runs as root may write anywhere: a file in the place of a folder stops root too.
        blocked = tmp_path / "file"
        blocked.write_text("")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(blocked))
        expect(caches.triton_cache(), Status.FAIL, "cannot be written", "set TRITON_CACHE_DIR")

    def test_a_full_disk(self, monkeypatch, tmp_path):
        monkeypatch.setattr(
            caches.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20, total=0, used=0)
        )
        finding = caches.cache("a cache", tmp_path, "SOME_DIR")
        expect(finding, Status.WARN, "0.0 GiB free", "free some space")

    def test_a_file_that_vanishes_does_not_count(self, tmp_path):
        (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
        assert caches.size_of(tmp_path) < 1000
        assert caches.nearest(Path("no/such/folder")) == Path.cwd()


class TestBackend:
    def test_registered_once(self):
        expect(entry_point.backend(), Status.OK, "fluxcompile.backend:flux, registered once")

    @pytest.mark.parametrize(
        ("values", "found", "advice"),
        [
            ([], "no entry point 'flux'", "install the package"),
            (["fluxcompile.backend:flux"] * 2, "once, got", "second copy"),
            (["other.backend:flux"], "other.backend", "uninstall"),
        ],
        ids=["missing", "twice", "another's"],
    )
    def test_not_so(self, monkeypatch, values, found, advice):
        entries = [SimpleNamespace(value=value) for value in values]
        monkeypatch.setattr(entry_point.metadata, "entry_points", lambda **_: entries)
        expect(entry_point.backend(), Status.FAIL, found, advice)

    def test_dynamo_does_not_load_it(self, monkeypatch):
        def refuse(name):
            raise AssertionError(f"duplicate name: {name}")

        monkeypatch.setattr(torch._dynamo, "lookup_backend", refuse)
        expect(entry_point.backend(), Status.FAIL, "duplicate name: flux", "register_backend")

    def test_dynamo_finds_another(self, monkeypatch):
        monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: absent)
        expect(entry_point.backend(), Status.FAIL, ":absent under the name", "register_backend")

    def test_dynamo_finds_ours(self):
        assert entry_point._look_up() is flux_backend.flux


@pytest.mark.parametrize(("status", "advice"), [(Status.FAIL, ""), (Status.OK, "do something")])
def test_advice_comes_with_trouble_and_only_then(status, advice):
    with pytest.raises(ValueError, match="expected advice with warn and fail only"):
        Finding("a check", status, "something", advice)
