"""Checked examples from whatever the caller has, before any hour is spent on them.

**Packing.** The method makes one routing decision a row, so a row never mixes tasks, and mixes
documents only where asked. What bounds padding is that a step's rows of similar length run together
(:class:`fluxcompile.training.sampling.ByLengthInStep`). What happens to a document's length here:

- longer than ``max_length``: a holistic document is cut into consecutive pieces, none of which
  crosses into another document; a last piece shorter than ``min_length`` is dropped. Documents
  of other tasks are refused: a cut would part the question from what it asks for.
- shorter than ``min_length``: refused, unless ``join_short`` lets neighbouring documents of one
  holistic task share a row. The token that opens each further document bears no loss then.

A piece's prompt is the part of the document's that it holds, or all of a piece that holds none. A
joined row's prompt ends where its last document's does.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from fluxcompile.errors import DataError
from fluxcompile.training.encoding import IGNORED, encode
from fluxcompile.training.tasks import Task


@dataclass(frozen=True, eq=False)
class Example:
    """One row to train on.

    Attributes:
        input_ids: [S] int64.
        labels: [S] int64; -100 where a token bears no loss. Not shifted: the model shifts them.
        task: name of its task.
        index: position among the prepared examples; seeds the row's noise.
        prompt_length: how many of its first tokens are the prompt, which the router reads; the
            others count as decoded. All of them if not given.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    task: str
    index: int
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        if self.prompt_length is None:
            object.__setattr__(self, "prompt_length", len(self))

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True, eq=False)
class _Document:
    where: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    prompt_length: int
    task: Task

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def prepare(
    data: Iterable[Mapping],
    tokenizer=None,
    *,
    tasks: Mapping[str, Task],
    min_length: int = 2,
    max_length: int | None = None,
    vocab_size: int | None = None,
    join_short: bool = False,
    limit: int | None = None,
) -> list[Example]:
    """Encode and check every row of ``data``; the first bad one raises, named by its position.

    Args:
        data: a ``datasets.Dataset``, a list, or any iterable of mappings with one of
            ``input_ids``, ``text`` and ``messages``, a ``task``, and perhaps ``labels``,
            ``prompt_length`` and ``unread_length`` (see
            :func:`fluxcompile.training.encoding.encode`). Other keys are ignored. It is read once
            and held in memory: 8 bytes a token, 16 with labels.
        tokenizer: needed for ``text`` and ``messages``.
        tasks: known tasks by name, from :func:`fluxcompile.training.tasks.resolve_tasks`.
        min_length: shortest row, in tokens, that can teach anything (up to sink + local tokens
            sparse attention equals full attention).
        max_length: longest row in tokens; None: no bound.
        vocab_size: token ids are checked to be below it; None: they are not.
        join_short: let short neighbouring documents of one holistic task share a row.
        limit: read this many rows at most (for endless iterables).

    Raises:
        DataError: a row is malformed, of an unknown task, too short or too long, or bears no
            loss; or there is no row at all.
    """
    if max_length is not None and max_length < max(min_length, 2):
        raise DataError.mismatch("max_length", f">= min_length ({min_length}) and >= 2", max_length)
    documents = (
        _document(row, i_row, tokenizer, tasks, vocab_size)
        for i_row, row in enumerate(islice(_rows(data), limit))
    )
    if join_short:
        documents = _joined(documents, tokenizer, max_length)
    examples: list[Example] = []
    for document in documents:
        for ids, labels, prompt in _pieces(document, min_length, max_length):
            examples.append(Example(ids, labels, document.task.name, len(examples), prompt))
    if not examples:
        raise DataError.mismatch("data", "at least one example", "none (a generator used up?)")
    return examples


def _rows(data) -> Iterator:
    if isinstance(data, Mapping):
        raise DataError.mismatch(
            "data", "rows (of a DatasetDict: one split)", f"a mapping with keys {list(data)}"
        )
    if isinstance(data, str) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError.mismatch("data", "an iterable of mappings", type(data).__name__)
    if hasattr(data, "__iter__"):
        return iter(data)
    return (data[i] for i in range(len(data)))  # a map-style torch Dataset


def _document(row, i_row: int, tokenizer, tasks: Mapping[str, Task], vocab_size) -> _Document:
    where = f"example {i_row}"
    if not isinstance(row, Mapping):
        raise DataError.mismatch(where, "a mapping", type(row).__name__)
    name = row.get("task")
    if not isinstance(name, str) or name not in tasks:
        raise DataError.mismatch(f"{where}: task", f"one of {sorted(tasks)}", repr(name))
    ids, labels, prompt = encode(row, tokenizer, where)
    if not len(ids):
        raise DataError.mismatch(where, "tokens", "an empty row")
    _check_ids(ids, vocab_size, f"{where}: input_ids")
    _check_ids(labels[labels != IGNORED], vocab_size, f"{where}: labels")
    if not _bears_loss(labels):
        raise DataError.mismatch(
            f"{where}: labels",
            f"one besides {IGNORED} after the first token",
            "none: its loss is NaN",
        )
    return _Document(where, ids, labels, prompt, tasks[name])


def _check_ids(ids: torch.Tensor, vocab_size: int | None, where: str) -> None:
    if not ids.numel():
        return
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        bound = "" if vocab_size is None else f" and < vocab_size ({vocab_size})"
        raise DataError.mismatch(where, f"token ids >= 0{bound}", low if low < 0 else high)


def _bears_loss(labels: torch.Tensor) -> bool:
    # The first token is never predicted, so a label there is none.
    return bool((labels[1:] != IGNORED).any())


def _pieces(document: _Document, min_length: int, max_length: int | None):
    length = len(document)
    if length < min_length:
        raise DataError.mismatch(document.where, f"at least {min_length} tokens", length)
    if max_length is None or length <= max_length:
        yield document.input_ids, document.labels, document.prompt_length
        return
    if document.task.kind != "holistic":
        raise DataError.mismatch(
            document.where,
            f"at most {max_length} tokens (only holistic documents are cut)",
            f"{length} of task {document.task.name!r}",
        )
    for start in range(0, length, max_length):
        piece = slice(start, start + max_length)
        ids, labels = document.input_ids[piece], document.labels[piece]
        if len(ids) >= min_length and _bears_loss(labels):
            held = min(max(document.prompt_length - start, 0), len(ids))
            yield ids, labels, held or len(ids)


def _joined(documents: Iterable[_Document], tokenizer, max_length: int | None):
    """Neighbours of one holistic task share a row as long as they fit into ``max_length``."""
    if max_length is None:
        raise DataError.mismatch("join_short", "a max_length to fill", None)
    held: list[_Document] = []
    for document in documents:
        if held and not _fits(held, document, max_length):
            yield _one_row(held, tokenizer)
            held = []
        held.append(document)
    if held:
        yield _one_row(held, tokenizer)


def _fits(held: list[_Document], document: _Document, max_length: int) -> bool:
    same = document.task == held[0].task and document.task.kind == "holistic"
    separators = len(held)
    return same and sum(map(len, held)) + len(document) + separators <= max_length


def _one_row(held: list[_Document], tokenizer) -> _Document:
    if len(held) == 1:
        return held[0]
    eos = getattr(tokenizer, "eos_token_id", None)
    separator = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    ids, labels = [held[0].input_ids], [held[0].labels]
    for document in held[1:]:
        opening = document.labels.clone()
        opening[0] = IGNORED
        ids += [separator, document.input_ids]
        labels += [torch.full_like(separator, IGNORED), opening]
    where = f"{held[0].where} to {held[-1].where}"
    row = torch.cat(ids)
    prompt = len(row) - len(held[-1]) + held[-1].prompt_length
    return _Document(where, row, torch.cat(labels), prompt, held[0].task)
