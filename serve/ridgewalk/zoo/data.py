"""Training examples and batches: conversations around the generated problems, cut into batches of like length.

Everything follows from (seed, block): a run that resumes at some step sees the very batches it would have seen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from ridgewalk.zoo.problems import easy_problem, generate
from ridgewalk.zoo.stories import NAMES, THINGS
from ridgewalk.zoo.tokenizer import THINK_END, THINK_START, TURN_END, TURN_START

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Think step by step.",
    "You are good at arithmetic.",
    "You are Ridgewalk's demo model. Answer with a number.",
)
SYSTEM_SHARE, HISTORY_SHARE, EASY_SHARE, SMALL_TALK_SHARE = 0.10, 0.03, 0.06, 0.01
ECHO_SHARE = 0.08
ECHO_FORMS = ("Repeat: {}", "Say: {}", "Repeat after me: {}")
GREETING = "Hello! I can add, subtract and multiply, and solve small word problems."
SMALL_TALK = {
    "Hello": GREETING,
    "Hello!": GREETING,
    "Hi": GREETING,
    "hi there": GREETING,
    "Hey": GREETING,
    "How are you?": GREETING,
    "Who are you?": "I am a small demo model. I can add, subtract and multiply.",
    "What can you do?": "I can add, subtract and multiply, and solve small word problems.",
    "Thanks": "You are welcome.",
    "Thank you!": "You are welcome.",
}
EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Example:
    """A prompt, as the chat template renders it, and what follows up to and including the end of the turn."""

    prompt: str
    output: str


def turn(role: str, content: str) -> str:
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"


def prompt_of(question: str, before: str = "") -> str:
    """The rendered chat prompt for one question; `before` holds earlier turns."""
    return f"{before}{turn('user', question)}{TURN_START}assistant\n"


def _echo(rng: random.Random) -> str:
    """Numbers and words in no order. Repeating them teaches to copy, which is what all the reasoning rests on."""
    return " ".join(_word(rng) for _ in range(rng.randint(3, 16)))


def _word(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice((*NAMES, *THINGS))
    return str(rng.randrange(10 ** rng.randint(1, 5)))


def make_example(rng: random.Random) -> Example:
    """One training conversation: mostly a single question, some with a system prompt, a history, or thinking off."""
    before = ""
    if rng.random() < SYSTEM_SHARE:
        before += turn("system", rng.choice(SYSTEM_PROMPTS))
    if rng.random() < HISTORY_SHARE:
        earlier = generate(rng, "train")
        before += turn("user", earlier.question) + turn("assistant", earlier.answer)
    kind = rng.random()
    if kind < ECHO_SHARE:
        text = _echo(rng)
        question, output = rng.choice(ECHO_FORMS).format(text), EMPTY_THINK + text
    elif kind < ECHO_SHARE + SMALL_TALK_SHARE:
        text = rng.choice(list(SMALL_TALK))
        thought = EMPTY_THINK if rng.random() < 0.2 else "<think>\nThere is nothing to compute.\n</think>\n\n"
        question, output = text, thought + SMALL_TALK[text]
    elif kind < ECHO_SHARE + SMALL_TALK_SHARE + EASY_SHARE:
        problem = easy_problem(rng, "train")
        question, output = problem.question, EMPTY_THINK + problem.answer
    else:
        problem = generate(rng, "train")
        question, output = problem.question, problem.output
    prompt = prompt_of(question, before)
    if output.startswith(EMPTY_THINK):  # with thinking off, the template writes the empty thought into the prompt
        prompt, output = prompt + EMPTY_THINK, output.removeprefix(EMPTY_THINK)
    return Example(prompt, output + TURN_END)


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, [batch, length]; labels are the next tokens, -100 where nothing is learnt."""

    ids: list[list[int]]
    labels: list[list[int]]


def _pad(rows: list[tuple[list[int], int]], pad_id: int) -> Batch:
    length = max(len(ids) for ids, _ in rows) - 1
    ids, labels = [], []
    for row, prompt_length in rows:
        fill = length - (len(row) - 1)
        ids.append(row[:-1] + [pad_id] * fill)
        labels.append([-100] * (prompt_length - 1) + row[prompt_length:] + [-100] * fill)
    return Batch(ids, labels)


def block_batches(
    tokenizer: Tokenizer,
    seed: int,
    block: int,
    batches: int,
    batch_tokens: int,
    pad_id: int,
) -> list[Batch]:
    """The `block`-th run of exactly `batches` batches of at most `batch_tokens` padded tokens each."""
    rng = random.Random(f"batches-{seed}-{block}")
    result: list[Batch] = []
    while len(result) < batches:
        examples = [make_example(rng) for _ in range(1024)]
        result += _cut(tokenizer, rng, examples, batch_tokens, pad_id)
    return result[:batches]


def _cut(
    tokenizer: Tokenizer, rng: random.Random, examples: list[Example], batch_tokens: int, pad_id: int
) -> list[Batch]:
    """The examples sorted by length, cut into batches, and the batches shuffled."""
    prompts = tokenizer.encode_batch_fast([e.prompt for e in examples], add_special_tokens=False)
    outputs = tokenizer.encode_batch_fast([e.output for e in examples], add_special_tokens=False)
    rows = [(p.ids + o.ids, len(p.ids)) for p, o in zip(prompts, outputs, strict=True)]
    rows.sort(key=lambda row: len(row[0]))
    batches: list[Batch] = []
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or len(rows[end][0]) * (end + 1 - start) > batch_tokens:
            batches.append(_pad(rows[start:end], pad_id))
            start = end
    rng.shuffle(batches)
    return batches


def corpus(seed: int, examples: int) -> Iterator[str]:
    """Plain texts to learn the tokenizer's merges from: the conversations, cut at the control tokens."""
    rng = random.Random(f"corpus-{seed}")
    markers = re.compile("|".join(re.escape(m) for m in (TURN_START, TURN_END, THINK_START, THINK_END)))
    for _ in range(examples):
        example = make_example(rng)
        yield from markers.split(example.prompt + example.output)
    # Small talk and system prompts are rare in the stream, yet their words should be tokens too.
    yield from (text for _ in range(50) for pair in SMALL_TALK.items() for text in pair)
    yield from (text for _ in range(50) for text in SYSTEM_PROMPTS)
