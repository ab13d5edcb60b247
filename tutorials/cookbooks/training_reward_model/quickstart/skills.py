"""The quickstart's skills: how each draws a twin, two prompts that have each other's right answer as wrong one.

Twins make the set honest. Of the answers A and B, A is right under the first prompt and wrong under the second,
so every answer text is chosen exactly as often as it is rejected, and only the prompt can tell which is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tutorials.cookbooks.training_reward_model.quickstart import dialogues, phrases

T = TypeVar("T")
Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Asked:
    """One prompt with its right answer.

    `cell` names the combination of subject and phrasing. A cell belongs wholly to training or wholly to validation,
    so that validation prompts are new combinations and not copies with another greeting.
    """

    prompt: Turns
    answer: str
    cell: str


Twin = tuple[Asked, Asked]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, each equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_two(rng: np.random.Generator, options: Sequence[T]) -> tuple[T, T]:
    """Two different entries of `options`, in random order."""
    first, second = rng.choice(len(options), size=2, replace=False)
    return options[int(first)], options[int(second)]


def dialogue(*texts: str, system: str | None = None) -> Turns:
    """Chat messages in which user and assistant take turns, the user first."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def polite(rng: np.random.Generator, question: str) -> str:
    """The question with a greeting before it and thanks after it, or with neither."""
    return f"{pick(rng, phrases.OPENERS)}{question}{pick(rng, phrases.CLOSERS)}"


def topic(rng: np.random.Generator) -> Twin:
    """Advice on the subject asked about, against equally fluent advice on another."""

    def ask(subject: str) -> Asked:
        template = pick(rng, phrases.TOPIC_QUESTIONS)
        prompt = dialogue(polite(rng, template.format(subject)))
        return Asked(prompt, pick(rng, phrases.TOPICS[subject]), f"{template}|{subject}")

    first, second = pick_two(rng, list(phrases.TOPICS))
    return ask(first), ask(second)


def fact(rng: np.random.Generator) -> Twin:
    """The fact asked for, against another of its family."""
    questions, answers, facts = phrases.FACTS[pick(rng, list(phrases.FACTS))]
    sentence = pick(rng, answers)

    def ask(subject: str) -> Asked:
        question = pick(rng, questions)
        prompt = dialogue(polite(rng, question.format(subject)))
        return Asked(prompt, sentence.format(facts[subject]), f"{question}|{subject}")

    first, second = pick_two(rng, list(facts))
    return ask(first), ask(second)


def language(rng: np.random.Generator) -> Twin:
    """The language asked for, against the same answer in another."""
    question = pick(rng, list(phrases.SMALL_TALK))
    first, second = pick_two(rng, range(len(phrases.LANGUAGES)))

    def ask(index: int) -> Asked:
        request = pick(rng, phrases.LANGUAGE_REQUESTS).format(phrases.LANGUAGES[index])
        prompt = dialogue(polite(rng, f"{question} {request}"))
        return Asked(prompt, phrases.SMALL_TALK[question][index], f"{question}|{request}")

    return ask(first), ask(second)


def write_list(items: Sequence[str], style: str) -> str:
    """Three items in one of the formats of `phrases.FORMATS`."""
    one, two, three = items
    return {
        "bullets": f"- {one}\n- {two}\n- {three}",
        "numbers": f"1. {one}\n2. {two}\n3. {three}",
        "capitals": f"{one} {two} {three}".upper(),
        "sentence": f"Three of them are {one}, {two} and {three}.",
        "commas": f"{one}, {two}, {three}",
    }[style]


def form(rng: np.random.Generator) -> Twin:
    """The format asked for, against the same three items in another."""
    thing = pick(rng, list(phrases.THINGS))
    items = [str(item) for item in rng.permutation(phrases.THINGS[thing])]

    def ask(style: str) -> Asked:
        request = pick(rng, phrases.FORMATS[style])
        question = pick(rng, phrases.THING_REQUESTS).format(thing)
        prompt = dialogue(polite(rng, f"{question} {request}"))
        return Asked(prompt, write_list(items, style), f"{question}|{request}")

    first, second = pick_two(rng, list(phrases.FORMATS))
    return ask(first), ask(second)


def tact(rng: np.random.Generator) -> Twin:
    """A reply in the mood of the news, against one that would hurt or puzzle."""

    def ask(mood: str) -> Asked:
        events, replies = dialogues.MOODS[mood]
        lead, event = pick(rng, dialogues.MOOD_LEADS), pick(rng, events)
        prompt = dialogue(f"{pick(rng, phrases.GREETINGS)}{lead.format(event)}{pick(rng, dialogues.MOOD_ENDS)}")
        return Asked(prompt, pick(rng, replies), f"{lead}|{event}")

    first, second = pick_two(rng, list(dialogues.MOODS))
    return ask(first), ask(second)


def memory(rng: np.random.Generator) -> Twin:
    """What the user mentioned some turns ago, against something never mentioned."""
    tellings, replies, questions, answers, values = dialogues.MEMORIES[pick(rng, list(dialogues.MEMORIES))]
    sentence = pick(rng, answers)

    def ask(value: str) -> Asked:
        telling, reply, question = pick(rng, tellings), pick(rng, replies), pick(rng, questions)
        told = f"{pick(rng, phrases.GREETINGS)}{telling.format(value)}"
        prompt = dialogue(told, reply.format(value), question)
        return Asked(prompt, sentence.format(value), f"{telling}|{question}|{value}")

    first, second = pick_two(rng, values)
    return ask(first), ask(second)


def change(rng: np.random.Generator) -> Twin:
    """The day the user settled on, against the day named before the change of mind."""
    errand = pick(rng, list(dialogues.BOOKINGS))
    days = pick_two(rng, dialogues.DAYS)

    def ask(before: str, after: str) -> Asked:
        wish = f"{pick(rng, phrases.GREETINGS)}I would like {errand} on {before}."
        prompt = dialogue(wish, pick(rng, dialogues.ACKNOWLEDGEMENTS), pick(rng, dialogues.CHANGES).format(after))
        return Asked(prompt, dialogues.BOOKINGS[errand].format(after), f"{errand}|{before}|{after}")

    return ask(*days), ask(*days[::-1])


def persona(rng: np.random.Generator) -> Twin:
    """The voice the system turn asks for, against the same advice in another voice."""
    hobby, advice = pick(rng, dialogues.HOBBIES), pick(rng, dialogues.SHORT_ADVICE)

    def ask(voice: str) -> Asked:
        instructions, openings, endings = dialogues.PERSONAS[voice]
        system = pick(rng, instructions)
        prompt = dialogue(polite(rng, pick(rng, phrases.TOPIC_QUESTIONS).format(hobby)), system=system)
        answer = f"{pick(rng, openings)} {advice} {pick(rng, endings)}"
        return Asked(prompt, answer, f"{system}|{hobby}")

    first, second = pick_two(rng, list(dialogues.PERSONAS))
    return ask(first), ask(second)


# name in the column `skill` -> how to draw a twin
SKILLS: dict[str, Callable[[np.random.Generator], Twin]] = {
    "topic": topic,
    "fact": fact,
    "language": language,
    "format": form,
    "tact": tact,
    "memory": memory,
    "change_of_mind": change,
    "persona": persona,
}
