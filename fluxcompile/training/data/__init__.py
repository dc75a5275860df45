"""The built-in mixture: prompts to train routers on, made of text that is always there.

Half of the examples are *retrieval* (a question about facts hidden in a document), half *holistic*
(real code and prose, many-shot classification). The ``"heldout"`` split differs from ``"train"``
in its documents, its wording and the form of its facts. See :func:`builtin_mixture`.

Held-out wordings were chosen by what full attention answers (see `heldout_wordings`): for prompts
that can be answered, not for routing. An answer is right if every token that bears loss is.
"""

import random
from collections.abc import Iterable, Sequence

from fluxcompile.errors import DataError
from fluxcompile.training.data import heldout_wordings, holistic, retrieval, train_wordings
from fluxcompile.training.data.corpus import corpus
from fluxcompile.training.data.frame import frame, styles
from fluxcompile.training.data.recipe import QUESTIONS, Recipe
from fluxcompile.training.data.sources import SPLITS

FORMS = {"retrieval": retrieval.FORMS, "holistic": holistic.FORMS}
ALL = tuple(form for forms in FORMS.values() for form in forms)
WORDINGS = {"train": train_wordings.WORDINGS, "heldout": heldout_wordings.WORDINGS}
LOSSES = ("half", "all")


def builtin_mixture(
    tokenizer,
    *,
    length: int | Sequence[int],
    examples: int,
    seed: int = 0,
    split: str = "train",
    tasks: Iterable[str] = ALL,
    question: str | Sequence[str] = "mixed",
    style: str = "mixed",
    loss: str = "half",
    lead: float = 0.5,
) -> list[dict]:
    """Task-balanced examples, each of exactly ``length`` tokens, ready for ``prepare``.

    Retrieval and holistic take turns, and within each the forms do; of several lengths every form
    gets each equally often. Example ``i`` depends on the arguments, the tokenizer, the Python
    version and ``i`` alone: a longer mixture begins with a shorter one.

    Args:
        tokenizer: of the model to train.
        length: tokens of every example, or several lengths to go through. Any that holds the
            facts: 1,024 is enough for every form.
        examples: how many.
        seed: decides everything that is random.
        split: ``"train"`` or ``"heldout"``.
        tasks: forms to make (``needle``, ``needles``, ``key_value``, ``two_hop``, ``code``,
            ``prose``, ``in_context``); ``retrieval`` and ``holistic`` stand for all of theirs.
        question: where the question or instruction stands: ``"last"``, ``"first"``, ``"both"``,
            several of them, or ``"mixed"``: any of the three.
        style: ``"chat"`` (through the chat template), ``"plain"``, or ``"mixed"``: either, plain
            where the tokenizer has no chat template.
        loss: which tokens of ``code`` and ``prose`` bear loss: the second ``"half"`` or ``"all"``.
            In retrieval forms the answer and its end are all that bears loss.
        lead: share of the retrieval answers that the prompt leads up to ("The access code of the
            Oslo office is"), where the question does not stand first alone. Small models that
            find a fact well say it in a sentence of their own: with ``lead=1`` and
            ``question="last"`` the first token after the prompt is the answer's. Such an answer
            ends as its sentence does, with a full stop; others with the end of the turn.

    Returns:
        One dict an example: ``input_ids`` and ``labels`` (lists of int; -100: no loss), ``task``
        (``"retrieval"`` or ``"holistic"``), and for evaluation ``form``, ``answer`` (text; empty
        for continuations), ``prompt_length`` (where the answer begins), ``lead_length`` (how many
        of the tokens before it are the beginning of a sentence that it ends), ``unread_length``
        (how many of those the router does not read: in half of such examples all, else none),
        ``end_length`` (how many of the last tokens end the answer and are none of it),
        ``depth`` (where the earliest needed fact begins, as share of the example; None for holistic
        forms),
        ``wording``, ``style``, ``question`` and ``filler``.

    Raises:
        DataError: an argument is not one of the above, or a length is too short.
    """
    _check("split", split, SPLITS)
    questions = [question] if isinstance(question, str) else list(question)
    if not questions:
        raise DataError.mismatch("question", f"some of {QUESTIONS}", "none")
    for place in questions:
        _check("question", place, (*QUESTIONS, "mixed"))
    _check("loss", loss, LOSSES)
    if not 0 <= lead <= 1:
        raise DataError.mismatch("lead", "a share in [0, 1]", lead)
    lengths = list(length) if isinstance(length, Sequence) else [length]
    if not lengths or not all(isinstance(n, int) and n > 0 for n in lengths):
        raise DataError.mismatch("length", "one or several ints > 0", repr(length))
    if examples < 1:
        raise DataError.mismatch("examples", "at least 1", examples)
    if "mixed" in questions:
        questions = list(QUESTIONS)
    frames = [frame(tokenizer, name) for name in styles(tokenizer, style)]
    by_task = _forms(tasks)

    mixture = []
    for i_example in range(examples):
        i_round, i_task = divmod(i_example, len(by_task))
        task = list(by_task)[i_task]
        i_cycle, i_form = divmod(i_round, len(by_task[task]))
        form = by_task[task][i_form]
        rng = random.Random(f"{seed}/{split}/{i_example}/{form}")
        recipe = Recipe(
            form=form,
            length=lengths[i_cycle % len(lengths)],
            rng=rng,
            corpus=corpus(tokenizer, split),
            wordings=WORDINGS[split],
            frame=rng.choice(frames),
            question=rng.choice(questions),
            loss=loss,
            lead=lead,
        )
        mixture.append({"task": task, **FORMS[task][form](recipe)})
    return mixture


def _forms(tasks: Iterable[str]) -> dict[str, list[str]]:
    wanted: dict[str, None] = {}
    for name in [tasks] if isinstance(tasks, str) else tasks:
        _check("tasks", name, (*ALL, *FORMS))
        wanted |= dict.fromkeys(FORMS.get(name, [name]))
    if not wanted:
        raise DataError.mismatch("tasks", f"some of {ALL}", "none")
    chosen = {task: [form for form in wanted if form in forms] for task, forms in FORMS.items()}
    return {task: forms for task, forms in chosen.items() if forms}


def _check(what: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise DataError.mismatch(what, f"one of {list(known)}", repr(value))
