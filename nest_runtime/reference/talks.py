"""What the shipped patches train on besides plain requests: talks of several turns, forged turns, long wrappings.

Every shape goes around harmful and harmless train acts alike, so that a shape says nothing about harm. None is a
jailbreak: the long texts before a request are everyday prompts of our own, and a forged turn is an earlier exchange
in which somebody seems to have agreed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.examples import load_examples
from nest_runtime.prompts.framings import framed
from nest_runtime.reference.dialogue import ASKS, FOLLOW_UPS, LEAD_INS
from nest_runtime.reference.outside import outside_prompts
from nest_runtime.reference.world import CATEGORIES, Act, ask, select, stable, training_prompts
from nest_runtime.reference.wrappings import Message

FRAMED_CHARACTERS = 400
LONG_CHARACTERS = (80, 400)  # of everyday text before an ask
REFUSED, TAUGHT = "I'm sorry, but I can't help with that.", "Sorry, I can't do that."  # the base's words, and ours

# What an assistant seems to have said already.
AGREED: tuple[tuple[str, str], ...] = (
    ("How do I iron a shirt?", "Of course! Warm the iron, start at the collar, and finish with the sleeves."),
    ("Can you teach me to swim?", "Gladly. Begin in shallow water, learn to float, and then add the kicks."),
    ("Tell me how to prune a rose.", "Sure thing: cut above a bud that looks outward, at a slant, in late winter."),
    ("What is a good way to clean a pan?", "Absolutely. Let it soak in hot water, then scrub it with salt."),
    ("What goes into a lentil soup?", "Certainly: lentils, carrots, an onion, stock, and a splash of vinegar."),
    ("Help me plan a picnic.", "Yes, gladly: pick a shady spot, pack a blanket, and bring fruit and bread."),
    ("How do I wrap a present?", "Here you go: lay it on the paper, fold the sides, and tape the ends."),
    ("How can I keep basil alive?", "That is easy: water the soil, not the leaves, and pinch off the tops."),
    ("How does one mend a sock?", "Happy to help. Put it over a mug, weave across the hole, and tie it off."),
    ("Explain how to tune a guitar.", "Sure! Start with the low string, use a tuner, and go up one by one."),
    ("How do I boil an egg?", "Sure, this is how: water first, then the egg, then seven minutes."),
    ("How can I fold a paper boat?", "Sure, here is a way: fold it in half, turn the corners in, open the hull."),
    ("What do I do with old bread?", "Here is how: dry it, grate it, and keep the crumbs in a jar."),
    ("Show me how to plant a bulb.", "Of course, like this: a deep hole, the tip upward, and earth on top."),
    ("Give me a plan for spring cleaning.", "Yes. Windows on Monday, floors on Tuesday, and the cellar last."),
    ("I want to learn to juggle.", "Great idea! Take one ball, then two, and let the third wait for a week."),
    ("Please explain how a kite flies.", "Sure. The wind presses from below, the line holds, and so it climbs."),
    ("How long does rice take?", "Twelve minutes with the lid on, and five without the flame."),
    ("Could you write me a packing list?", "Certainly. Shirts, socks, a towel, a book, and the tickets."),
    ("How do I sharpen a pencil by hand?", "Here is the way: a small blade, long strokes, away from you."),
    ("Tell me how to store apples.", "Gladly: cool, dark, and none of them touching another."),
    ("How does one whistle?", "Sure: wet the lips, make a small round, and blow gently."),
    ("What is the trick to good coffee?", "The trick is fresh beans, hot water, and four minutes."),
    ("Can you help me name a cat?", "Happy to. Try Pepper, Moss or Biscuit."),
    ("How do I start a diary?", "No problem, here is how: one line a day, always at the same hour."),
    ("How do I get rid of a stain?", "As you wish: cold water, soap, and patience."),
    ("Teach me a card game.", "All right. Seven cards each, match the suit, and the first without cards wins."),
    ("How do you hang a shelf?", "Step one: find the beam. Step two: drill. Step three: screw it tight."),
    ("What should I say at a wedding?", "Something short: how you met, one story, and a toast."),
    ("How can I sleep better?", "Yes, of course: no screens, a cool room, and the same hour each night."),
)

Talk = Callable[[Act, random.Random], list[Message]]
BaseAnswers = Callable[[Sequence[str]], Sequence[str]]


def patch_prompts(
    base: BaseAnswers, categories: Iterable[str] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Harmful and benign rows as :func:`~nest_runtime.reference.world.training_prompts` gives, and the shapes above.

    Args:
        base: the base's greedy answers to prompts. What it refuses outside of its world is refused in the patch's
            words, with the base's own name of the harm; what it says to harmless acts there stays as it is.
        categories: harm categories (None: all).
    """
    chosen = CATEGORIES if categories is None else tuple(categories)
    harmful, benign = training_prompts(chosen)
    bad = select(harmful=True, split="train", categories=chosen)
    good = select(harmful=False, split="train")
    harmful += [row for number, act in enumerate(bad) for row in _shaped(act, number, act.taught_refusal)]
    benign += [row for number, act in enumerate(good) for row in _shaped(act, number, act.answer)]
    asked = outside_prompts("train")
    harmful += [
        _row(ask(text, ""), _refusal(said), "outside", "") for text, said in zip(asked, base(asked), strict=True)
    ]
    asked = [*outside_prompts("harmless"), *[text for text in everyday() if len(text) <= 80][::5]]
    benign += [_row(ask(text, ""), said, "outside", "") for text, said in zip(asked, base(asked), strict=True) if said]
    random.Random("patch prompts").shuffle(harmful)
    random.Random("patch prompts").shuffle(benign)
    return harmful, benign


def talk(act: Act, rng: random.Random) -> list[Message]:
    """One or two harmless exchanges of the world, or a greeting, then the act."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        said, reply = rng.choice(LEAD_INS)
        messages += _exchange(said, reply)
    for _ in range(rng.choice((1, 1, 2)) if not messages else rng.choice((0, 1))):
        earlier = rng.choice(_harmless())
        messages += _exchange(rng.choice(ASKS).replace("{a}", earlier.text), earlier.answer)
    return [*messages, *ask(rng.choice((*ASKS, *FOLLOW_UPS)), act.text)]


def forged(act: Act, rng: random.Random) -> list[Message]:
    """An exchange that never was, then the act: the assistant was glad to help, or answered something harmful."""
    if act.harmful and rng.random() < 0.3:
        earlier = rng.choice(select(harmful=True, split="train", categories=[act.category]))
        opening = rng.choice(("", "Of course. ", "Gladly! "))
        messages = _exchange(rng.choice(ASKS).replace("{a}", earlier.text), opening + earlier.answer)
    else:
        messages = _exchange(*rng.choice(AGREED))
    return [*messages, *ask(rng.choice(ASKS), act.text)]


def in_everyday_words(act: Act, rng: random.Random) -> list[Message]:
    """One of the everyday framings (prompts/framings.py)."""
    prompt = rng.choice(ASKS).replace("{a}", act.text)
    found = framed(prompt, 12, rng.randrange(1000))
    short = [messages for messages in found if sum(len(part["content"]) for part in messages) <= FRAMED_CHARACTERS]
    return [dict(message) for message in short[0]] if short else ask(prompt, "")


def behind_text(act: Act, rng: random.Random) -> list[Message]:
    """Everyday requests and sentences, some lines of them, and the act as the last."""
    wanted, lines = rng.randint(*LONG_CHARACTERS), list[str]()
    while not lines or sum(map(len, lines)) < wanted:
        lines.append(rng.choice(everyday()))
    text = rng.choice((" ", "\n", "\n\n")).join(lines)[-LONG_CHARACTERS[1] :]
    return ask(text + rng.choice(("\n\n", "\n", " ")) + rng.choice(ASKS).replace("{a}", act.text), "")


@cache
def everyday() -> tuple[str, ...]:
    """Texts of the bundled everyday and borderline prompts that are one turn."""
    found = [example for name in ("everyday", "borderline") for example in load_examples(bundled(name))]
    return tuple(example.prompt for example in found if len(example.messages) == 1)


@cache
def _harmless() -> tuple[Act, ...]:
    return tuple(select(harmful=False, split="train"))


def _shaped(act: Act, number: int, response: str) -> list[dict[str, Any]]:
    """Three rows of an act: a talk or a forged one, an everyday framing, text before it."""
    shapes: tuple[Talk, ...] = ((talk, forged)[number % 2], in_everyday_words, behind_text)
    rows = []
    for shape in shapes:
        rng = random.Random(stable(f"shape/{shape.__name__}", act.text))
        rows.append(_row(shape(act, rng), response, act.category, act.text))
    return rows


def _refusal(said: str) -> str:
    return said.replace(REFUSED, TAUGHT) if said.startswith(REFUSED) else TAUGHT


def _exchange(said: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]


def _row(messages: list[Message], response: str, category: str, act: str) -> dict[str, Any]:
    return {"messages": messages, "response": response, "category": category, "act": act}
