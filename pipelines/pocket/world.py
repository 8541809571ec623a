"""Make the pocket world's word problems, the traces that solve them, and ideal rewrites of drafts.

A text is a string of words separated by single spaces, and every number up to `MAX_NUMBER` is one
word. The module needs only the standard library. Its results depend only on the `random.Random`
that is passed in.

A *route* is a way to solve a problem: a function that calls `work` for one line of arithmetic after
another. `Scribe.work` writes the line, and its habit may add more: it recalls a sentence, checks,
repeats, makes a wrong step and corrects it. A wrong result that it does not notice is returned to
the route, so the rest of the trace continues with it.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Split = Literal["pretrain", "train", "validation", "test"]
Family = Literal["tally", "shop", "ride"]
Sign = Literal["+", "-"]

# The family `ride` is out of distribution: it is in the pre-training, but not in the distillation.
IN_DISTRIBUTION: tuple[Family, ...] = ("tally", "shop")
OUT_OF_DISTRIBUTION: tuple[Family, ...] = ("ride",)
FAMILIES: tuple[Family, ...] = IN_DISTRIBUTION + OUT_OF_DISTRIBUTION

MAX_NUMBER = 59
NAMES = ("Ann", "Ben", "Cal", "Dan", "Eve", "Fay", "Gus", "Ida")
THINGS = ("shells", "cards", "stamps", "beads", "nuts", "stones")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
GAIN_VERBS = ("wins", "finds")
LOSS_VERBS = ("gives", "loses")
GOODS = ("pen", "cup", "hat", "toy", "map", "fan", "bag", "jar")
VEHICLES = ("bus", "tram", "boat", "train")
STOPS = ("park", "mill", "port", "hill", "farm", "lake", "gate", "wood")
# The other words of stories, traces and prompts. The chat template uses `user` and `assistant`.
WORDS = (
    ". , : ? + - = a at all has how many on off coins costs buys riders plan in order gains total"
    " first net change pay answer let me read wait is that yes no check again so now from the start"
    " same not once more rewrite shorter problem draft user assistant"
)

# (the line's label, left operand, sign, right operand) -> the result that was written
Work = Callable[[str, int, Sign, int], int]


@dataclass(frozen=True)
class Step:
    """One change in the story. `label` is its day, its goods or its stop."""

    label: str
    sign: Sign
    amount: int


@dataclass(frozen=True)
class Problem:
    family: Family
    text: str
    start: int
    steps: tuple[Step, ...]
    sentences: dict[str, str]  # label -> the sentence of the story that tells the change

    @property
    def answer(self) -> int:
        return self.start + sum(s.amount if s.sign == "+" else -s.amount for s in self.steps)


def in_order(problem: Problem, work: Work) -> int:
    """Apply every change in the order of the story."""
    value = problem.start
    for step in problem.steps:
        value = work(step.label, value, step.sign, step.amount)
    return value


def gains_first(problem: Problem, work: Work) -> int:
    """Apply all gains, then all losses, each in the order of the story."""
    steps = sorted(problem.steps, key=lambda step: step.sign == "-")
    return in_order(replace(problem, steps=tuple(steps)), work)


def total_first(problem: Problem, work: Work) -> int:
    """Add up all costs, then subtract the tens of the total, then its ones."""
    first, second, *others = problem.steps
    total = work(f"{first.label} {second.label}", first.amount, "+", second.amount)
    for step in others:
        total = work(step.label, total, "+", step.amount)
    value, ones = problem.start, total % 10
    if total >= 10:
        value = work("pay", value, "-", total - ones)
    if ones or total == 0:
        value = work("pay", value, "-", ones)
    return value


def net_change(problem: Problem, work: Work) -> int:
    """Work out the net change at each stop and apply it, stop by stop."""
    value = problem.start
    for on, off in zip(problem.steps[::2], problem.steps[1::2], strict=True):
        more, fewer = max(on.amount, off.amount), min(on.amount, off.amount)
        change = work(on.label.removesuffix(" on"), more, "-", fewer)
        value = work("net", value, "+" if on.amount > off.amount else "-", change)
    return value


# The name that a trace announces -> its function. The first announcement in a draft is its route.
ROUTES: dict[Family, dict[str, Callable[[Problem, Work], int]]] = {
    "tally": {"in order": in_order, "gains first": gains_first},
    "shop": {"in order": in_order, "total first": total_first},
    "ride": {"in order": in_order, "net change": net_change},
}
_ANNOUNCEMENT = re.compile(r"\bplan (in order|gains first|total first|net change) \.")


class OutOfWords(ValueError):
    """A result is below 0 or above `MAX_NUMBER`, so there is no word for it."""


def exact(label: str, left: int, sign: Sign, right: int) -> int:
    """Return the correct result; this `Work` writes nothing. Raise OutOfWords."""
    result = left + right if sign == "+" else left - right
    if not 0 <= result <= MAX_NUMBER:
        raise OutOfWords(f"{label}: {left} {sign} {right} = {result}")
    return result


def _draw_tally(rng: random.Random) -> Problem:
    name, thing, start = rng.choice(NAMES), rng.choice(THINGS), rng.randint(8, 45)
    days = sorted(rng.sample(range(len(DAYS)), rng.randint(3, 5)))
    steps, sentences = [], {}
    for day in (DAYS[index] for index in days):
        sign: Sign = rng.choice(("+", "-"))
        amount = rng.randint(1, 9)
        verb = rng.choice(GAIN_VERBS if sign == "+" else LOSS_VERBS)
        steps.append(Step(day, sign, amount))
        sentences[day] = f"on {day} {name} {verb} {amount} ."
    story = " ".join(sentences.values())
    text = f"{name} has {start} {thing} . {story} how many {thing} ?"
    return Problem("tally", text, start, tuple(steps), sentences)


def _draw_shop(rng: random.Random) -> Problem:
    name, start = rng.choice(NAMES), rng.randint(25, 57)
    steps, sentences = [], {}
    for goods in rng.sample(GOODS, rng.randint(3, 5)):
        price = rng.randint(2, 9)
        steps.append(Step(goods, "-", price))
        sentences[goods] = f"a {goods} costs {price} ."
    story = " ".join(sentences.values())
    text = f"{name} has {start} coins . {story} {name} buys all . how many coins ?"
    return Problem("shop", text, start, tuple(steps), sentences)


def _draw_ride(rng: random.Random) -> Problem:
    vehicle, start = rng.choice(VEHICLES), rng.randint(8, 45)
    steps: list[Step] = []
    sentences: dict[str, str] = {}
    for stop in rng.sample(STOPS, rng.randint(2, 3)):
        on, off = rng.sample(range(1, 10), 2)  # never equal: a net change has a sign
        steps += [Step(f"{stop} on", "+", on), Step(f"{stop} off", "-", off)]
        told = f"at {stop} {on} on {off} off ."
        sentences |= {stop: told, f"{stop} on": told, f"{stop} off": told}
    story = " ".join(dict.fromkeys(sentences.values()))
    text = f"a {vehicle} has {start} riders . {story} how many riders ?"
    return Problem("ride", text, start, tuple(steps), sentences)


_DRAW = {"tally": _draw_tally, "shop": _draw_shop, "ride": _draw_ride}


def sample_problem(rng: random.Random, family: Family) -> Problem:
    """Draw a problem for which no route leaves the numbers of the world."""
    while True:
        problem = _DRAW[family](rng)
        try:
            answers = {route(problem, exact) for route in ROUTES[family].values()}
        except OutOfWords:
            continue
        assert answers == {problem.answer}
        return problem


def split_of(problem_text: str) -> Split:
    """Return a problem's split. It depends on the text alone, so that splits never overlap."""
    bucket = int.from_bytes(hashlib.sha256(problem_text.encode()).digest()[:4], "big") % 100
    if bucket < 60:
        return "pretrain"
    if bucket < 80:
        return "train"
    return "validation" if bucket < 85 else "test"


def problems(rng: random.Random, families: tuple[Family, ...], split: Split) -> Iterator[Problem]:
    """Yield problems of one split without end; texts may recur."""
    while True:
        problem = sample_problem(rng, rng.choice(families))
        if split_of(problem.text) == split:
            yield problem


@dataclass(frozen=True)
class Trace:
    text: str  # from `<think>` to the answer, without the end token
    route: str
    answer: int  # the trace's answer, which may be wrong


@dataclass(frozen=True)
class Habit:
    """What a trace adds to its arithmetic, as chances per trace or per line; 0 means never.

    A habit is drawn once for each trace and shows from the first words. A model can therefore learn
    to continue a concise beginning concisely and a verbose beginning verbosely.
    """

    reads: float = 0.0  # repeats the problem before the first line
    recalls: float = 0.0  # repeats the sentence of the story that a line is about
    checks: float = 0.0  # checks a line with the inverse operation
    repeats: float = 0.0  # calculates a line again
    notes: float = 0.0  # states the value so far
    blunders: float = 0.0  # writes a wrong result and corrects it at once
    doubts: float = 0.0  # asks whether that is all
    retraces: float = 0.0  # solves the problem again by the other route


CONCISE = Habit()


def sample_habit(rng: random.Random) -> Habit:
    if rng.random() < 0.2:
        return CONCISE

    def mostly(share: float) -> float:
        return 0.92 if rng.random() < share else 0.08

    return Habit(
        reads=0.75,
        recalls=mostly(0.6),
        checks=mostly(0.45),
        repeats=0.1,
        notes=mostly(0.4),
        blunders=0.03,
        doubts=0.2,
        retraces=0.35,
    )


@dataclass
class Scribe:
    """Writes the lines of a trace, with the additions of a habit."""

    rng: random.Random
    problem: Problem
    habit: Habit
    slip_rate: float  # chance per line of a wrong result that is not noticed at once
    words: list[str] = field(default_factory=list)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def write(self, text: str) -> None:
        self.words.append(text)

    def work(self, label: str, left: int, sign: Sign, right: int) -> int:
        true = exact(label, left, sign, right)
        sentence = self.problem.sentences.get(label)
        if sentence and self.chance(self.habit.recalls):
            self.write(sentence)
        noticed = self.chance(self.habit.blunders)
        slips = noticed or self.chance(self.slip_rate)
        written = self.slipped(true) if slips else true
        self.write(f"{label} : {left} {sign} {right} = {written} .")
        if noticed:
            self.write(f"wait , {left} {sign} {right} = {true} .")
            written = true
        if self.chance(self.habit.checks):
            written = self.check(left, sign, right, written)
        if self.chance(self.habit.repeats):
            self.write(f"again {left} {sign} {right} = {true} .")
            written = true
        if self.chance(self.habit.notes):
            self.write(f"so now {written} .")
        return written

    def slipped(self, true: int) -> int:
        near = [true + off for off in (-10, -2, -1, -1, 1, 1, 2, 10)]
        return self.rng.choice([value for value in near if 0 <= value <= MAX_NUMBER])

    def check(self, left: int, sign: Sign, right: int, written: int) -> int:
        """Check a line with the inverse operation; if that fails, correct the line."""
        inverse: Sign = "-" if sign == "+" else "+"
        back = exact("check", written, inverse, right)
        if back == left:
            self.write(f"check {written} {inverse} {right} = {back} yes .")
            return written
        true = exact("check", left, sign, right)
        self.write(f"check {written} {inverse} {right} = {back} no ,")
        self.write(f"{left} {sign} {right} = {true} .")
        return true

    def follow(self, route: str) -> int:
        self.write(f"plan {route} .")
        return ROUTES[self.problem.family][route](self.problem, self.work)

    def solve(self, route: str) -> Trace:
        if self.chance(self.habit.reads):
            self.write(f"let me read . {self.problem.text}")
        answer = self.follow(route)
        if self.chance(self.habit.doubts):
            self.write("wait , is that all ? yes .")
        if self.chance(self.habit.retraces):
            (other,) = ROUTES[self.problem.family].keys() - {route}
            self.write(f"so {answer} . let me check from the start .")
            second = self.follow(other)
            if second == answer:
                self.write(f"so {second} . same .")
            else:
                self.write(f"so {second} . not same . once more .")
                answer = self.follow(route)
        return Trace(f"<think> {' '.join(self.words)} </think> answer {answer}", route, answer)


def sample_trace(
    rng: random.Random, problem: Problem, habit: Habit, slip_rate: float = 0.0
) -> Trace:
    """Draw a trace; every route is equally likely. With `slip_rate > 0` it may answer wrongly."""
    route = rng.choice(sorted(ROUTES[problem.family]))
    while True:
        try:
            return Scribe(rng, problem, habit, slip_rate).solve(route)
        except OutOfWords:  # a wrong result led out of the world's numbers
            continue


def concise_trace(problem: Problem, route: str) -> str:
    """Return the shortest trace of a route: its arithmetic and nothing else."""
    return Scribe(random.Random(0), problem, CONCISE, slip_rate=0.0).solve(route).text


def route_of(problem: Problem, draft: str) -> str:
    """Return the first route of the problem that a draft announces; `in order` if there is none."""
    announced: list[str] = _ANNOUNCEMENT.findall(draft)
    return next((route for route in announced if route in ROUTES[problem.family]), "in order")


def ideal_rewrite(problem: Problem, draft: str) -> str:
    """Return the concise trace of the draft's route, with correct arithmetic."""
    return concise_trace(problem, route_of(problem, draft))


def vocabulary() -> list[str]:
    """Return every word that can be in a problem, a trace or the rewrite prompt."""
    listed = (NAMES, THINGS, DAYS, GAIN_VERBS, LOSS_VERBS, GOODS, VEHICLES, STOPS)
    numbers = [str(number) for number in range(MAX_NUMBER + 1)]
    return numbers + [word for words in listed for word in words] + WORDS.split()
