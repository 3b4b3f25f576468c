r"""Grading, on a table of tricky answers.

The table says what is judged, also where one may wonder: those lines are under "math-verify's own view".
"""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from archscale_megatron.evaluation.grading import Grader, expression, last_box, letter

MATRIX = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"

# Title: (answer of the data, content of the response's box, right).
BOXED = {
    "fractions": [
        (r"\frac{1}{2}", "0.5", True), (r"\frac12", "1/2", True), (r"\frac{1}{2}", r"\dfrac{2}{4}", True),
        (r"\frac{1}{2}", "0.499", False), (r"\frac32", r"1\frac{1}{2}", True), ("3.5", r"3\frac12", True),
        (r"-\frac12", r"\frac{-1}{2}", True), (r"-\frac12", r"\frac{1}{-2}", True), (r"\frac{3}{4}", "3:4", True),
        (r"\frac{\frac12}{3}", r"\frac{1}{6}", True),
    ],
    "rounding, to six decimals": [
        (r"\frac{1}{3}", "0.333", False), (r"\frac{1}{3}", "0.333333", True), (r"\pi", "3.14159265359", True),
        (r"\sqrt{2}", "1.414", False), (r"\sqrt{2}", "1.41421356", True),
    ],
    "sign": [("3", "-3", False), ("-3", "3", False), ("-3", "-3", True), ("0", "-0", True), ("6-5i", "6+5i", False)],
    "equivalent forms": [
        (r"2\sqrt{2}", r"\sqrt{8}", True), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}", True), ("3", r"\sqrt{9}", True),
        ("x^2+2x+1", "(x+1)^2", True), ("p-q", "-q+p", True), ("2k+2", "2(k+1)", True), ("x+1", "x+2", False),
        ("1024", "2^{10}", True), ("120", "5!", True), ("10", r"\binom{5}{2}", True), ("3", r"\log_2 8", True),
        ("6-5i", "-5i+6", True), ("y=2x+1", "y-2x=1", True), ("2k+2", r"2\left(k+1\right)", True),
    ],
    "thousands separators": [
        ("1000", "1,000", True), ("1000", "1{,}000", True), ("1000", r"1,\!000", True), ("32348", r"\$32,\!348", True),
        ("10,000", "10000", True), ("1000000", "1,000,000", True), ("1000", "1.000", False),
    ],
    "units, degrees, percent": [
        ("5", r"5\text{ cm}", True), ("5", "5 cm", True), ("5", r"5\,\mathrm{m/s}", True),
        ("5.4", r"5.4\text{ cents}", True),
        ("5", r"5\text{ m}^2", True), ("33", r"33 \text{ ways}", True), (r"90^\circ", "90", True),
        ("90", r"90^\circ", True),
        (r"90^\circ", r"90\text{ degrees}", True), (r"50\%", "0.5", True), ("0.05", r"5\%", True), ("4", r"5\%", False),
    ],
    "scientific notation": [("1500000", r"1.5 \times 10^6", True), ("0.0002", r"2\times10^{-4}", True)],
    "intervals": [
        ("[1,2)", "[1,2)", True), ("[1,2)", "[1,2]", False), ("(1,2]", "(1,2)", False), ("x>2", r"(2,\infty)", True),
        (r"x \in [-2,7]", "[-2,7]", True), ("[-2,7]", r"x \in [-2,7]", True), (r"\infty", r"-\infty", False),
    ],
    "sets and lists": [
        (r"\{1,2,3\}", r"\{3,2,1\}", True), ("1,2,3", r"\{3,2,1\}", True), ("1,-2", "-2, 1", True), ("1,2", "1", False),
        (r"\{1,2\}", r"1 \text{ and } 2", True), ("1,2", "x=1,x=2", True), ("(1,2)", "(2,1)", False),
        ("1", "1,2", False),
        (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2", True), (r"\emptyset", r"\{\}", True), ("(3,4)", "3,4", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
    ],
    "matrices": [
        (MATRIX, MATRIX, True), (MATRIX, MATRIX.replace("pmatrix", "bmatrix"), True),
        (MATRIX, r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", False),
        (r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac{4}{2} \end{pmatrix}", True),
    ],
    "words": [
        (r"\text{Evelyn}", "Evelyn", True), (r"\text{Evelyn}", r"\mathrm{Evelyn}", True), (r"\text{(C)}", "C", True),
        ("even", r"\text{even}", True), (r"\text{east}", r"\text{west}", False),
    ],
    "integers": [
        ("33", "033", True), ("33", "33.0", True), ("33", r"\textbf{33}", True), ("33", "m+n=33", True),
        ("33", "33!", False),
        ("33", "x+y = 30+3 = 33", True), ("204", " 204 ", True), ("33", "333", False),
    ],
    "nothing to read": [
        ("3", "", False), ("3", " ", False), ("3", r"\undefined{3}", False), ("3", r"\frac", False), ("3", "?", False),
        ("3", r"\text{no idea}", False),
    ],
    "math-verify's own view: right": [
        ("5", r"5\%", True), ("50", r"50\%", True),  # a percentage is its number, too
        (r"5 \text{ cm}", r"5 \text{ m}", True),  # units do not count
        ("4210_5", "4210", True), ("4210", "4210_5", True),  # nor does the base
        ("2x+1", "y=2x+1", True), ("3,4", "(3,4)", True), (r"\text{Evelyn}", r"\text{evelyn}", True),
    ],
    "math-verify's own view: wrong": [
        ("33", "33.", False), ("33", "~33", False), ("1000", r"1\,000", False), ("1000", "1 000", False),
        ("1500000", "1.5e6", False),
        ("[1,2)", r"1 \le x < 2", False), (r"(2,\infty)", "x>2", False),  # not from an interval to an inequality
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)", False), (r"90^\circ", r"\frac{\pi}{2}", False),
        (r"\text{no solution}", r"\emptyset", False), (r"\pi", "3.14159", False),
    ],
}  # fmt: skip

# Title: (answer of the data, response, right).
RESPONSES = {
    "text around": [
        ("3", r"So we get $x = \boxed{3}$, as was to be shown.", True), ("3", "$$\\boxed{\n3\n}$$", True),
        ("3", r"\fbox{3}", True),
        ("3", r"**Final answer:** \( \boxed{3} \)", True), ("4", r"\boxed {4}", True),
    ],
    "several boxes: the last": [
        ("4", r"\boxed{3} or rather \boxed{4}", True), ("3", r"\boxed{3} or rather \boxed{4}", False),
        ("1,2", r"$\boxed{1}$ and $\boxed{2}$", False),  # math-verify alone would take the pair
    ],
    "nested braces": [
        (r"\frac{1}{\sqrt{2}}", r"\boxed{\frac{1}{\sqrt{2}}}", True), ("3", r"\boxed{\boxed{3}}", True),
        (r"\{1,2\}", r"\boxed{\left\{1, 2\right\}}", True),
        (r"\sqrt{1+\sqrt{2}}", r"\boxed{{\sqrt{{1+\sqrt{2}}}}} }", True),
    ],
    "unfinished": [
        ("3", r"so it is \boxed{3", False), ("3", r"it is 3, in short \boxed{", False),
        ("3", r"\boxed{\frac{3}{1}", False),
        ("3", r"\boxed{3} and also \boxed{4", True),  # the last whole box
        ("3", "", False), ("3", " \n", False),
    ],
    "thinking": [
        ("3", r"<think>maybe \boxed{4}</think>It is \boxed{3}.", True),
        ("3", r"<think>\boxed{3}</think> It is 4.", False),
        ("3", r"maybe \boxed{4}</think>\boxed{3}", True),  # the prompt had opened it
        ("3", r"<think>\boxed{3}", False), ("3", r"<think>\boxed{3}</think>", False),
    ],
    "no box": [
        ("3", "3", True), ("3", "So x = 3", True), ("3", "The final answer is 3. I hope it is correct.", True),
        ("3", "the answer is 3, not 4", True), ("1/2", "the answer is $\\frac{1}{2}$", True), ("-5", "x = -5", True),
        ("1000", "The answer is 1,000.", True), ("18", "She makes 9 * 2 = $18 every day.", True),
        ("72", "#### 72", True),
        ("3", "no idea", False), ("3", "the answer is three", False),
        ("3", "I get $3$ and then 5 apples", False),  # the last number
    ],
}  # fmt: skip

LETTERS = [
    *((rf"I think \boxed{{{box}}}", "B") for box in (
        "B", "b", "(B)", "B.", "B)", "[B]", r"\text{B}", r"\textbf{(B)}", r"\mathbf{B}", "B) 5 m", "B: five",
        r"\text{Option B}",
        r"\text{Answer: B}", r"\, B", "$B$",
    )),
    *((text, "B") for text in (
        "Answer: B", "**Answer:** (B)", "**Answer: B**", "ANSWER: $B$", r"Answer: \text{B}", "Answer: B) 3 eV",
        "The answer is B.",
        "The correct answer is (B).", "the answer is **B**", "The answer is option B", "The answer must be B",
        "I choose option B", "The correct choice is B", "So the correct option is: B",
        "The answer is B because A is wrong",
        "B", "(B)", "It follows.\n**B**.", "Answer: A\nNo, wait.\nAnswer: B", r"Answer: A, no: \boxed{B}",
        "<think>Answer: A</think>Answer: B",
    )),
    *((text, None) for text in (
        r"\boxed{}", r"\boxed{", r"\boxed{A, B}", r"\boxed{AB}", r"\boxed{E}", r"\boxed{10^{-4}}",
        r"\boxed{5}, so Answer: B",
        "", "None of these", "A charge is moved", "The answer is a big one", "The answer is A good one",
        "Answer: Because",
        "the answer is Dirac's", "The answer is not B", "<think>Answer: B", "E", "Answer: E",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as one:
        yield one


@pytest.mark.parametrize("title", BOXED)
def test_boxed_answers(grader: Grader, title: str) -> None:
    judged = [
        (gold, box, grader.grade(rf"It is $\boxed{{{box}}}$.", gold, "math").correct) for gold, box, _ in BOXED[title]
    ]
    assert judged == BOXED[title]


@pytest.mark.parametrize("title", RESPONSES)
def test_responses(grader: Grader, title: str) -> None:
    judged = [(gold, text, grader.grade(text, gold, "math").correct) for gold, text, _ in RESPONSES[title]]
    assert judged == RESPONSES[title]


def test_letters(grader: Grader) -> None:
    assert [(text, letter(text)) for text, _ in LETTERS] == LETTERS
    assert grader.grade("Answer: B", "B", "letter").correct
    assert not grader.grade("Answer: B", "A", "letter").correct
    assert not grader.grade("", "A", "letter").correct


def test_boxes_and_what_math_verify_reads() -> None:
    assert last_box("no box") is None
    assert last_box(r"\boxed{a\}b}") == r"a\}b"
    assert last_box(r"\boxed{1}\boxed{2") == "1"
    assert last_box(r"\boxed{2") == ""
    assert expression(r"x = 1, \boxed{x_{1}} done") == r"\boxed{x_{1}}"
    assert expression("it is 4") == "it is 4"
    assert expression(r"it is 4, \boxed{") is None


def test_equality_goes_either_way(grader: Grader) -> None:
    def grade(text: str) -> object:
        return grader.grade(rf"\boxed{{{text}}}", "99", "math")

    assert grader.equal(grade("0.5"), grade(r"\frac{1}{2}"))
    assert grader.equal(grade("x>2"), grade(r"(2,\infty)")) and grader.equal(grade(r"(2,\infty)"), grade("x>2"))
    assert not grader.equal(grade("3"), grade("4"))
    assert not grader.equal(grade(""), grade(""))  # neither has an answer
    one, other, same = (grader.grade(f"Answer: {text}", "D", "letter") for text in "ABA")
    assert grader.equal(one, same) and not grader.equal(one, other)


HARD = [
    r"9^{9^{9^9}}", r"10000000!", r"\binom{100000000}{50000000}", r"\int_0^1 x^{x^{x^x}} dx",
    "(" * 3000 + "1" + ")" * 3000,
    "9" * 100_000, r"\frac{" * 300, "\x00\ud800 \u2028",
]  # fmt: skip


def test_no_answer_raises_or_hangs() -> None:
    with Grader(seconds=2) as grader:
        assert grader.grade("3", "3", "math").correct  # it has started
        for answer in HARD:
            begun = time.monotonic()
            for text in (rf"\boxed{{{answer}}}", f"so it is {answer} in the end"):
                assert not grader.grade(text, "7", "math").correct
            assert time.monotonic() - begun < 8, answer[:40]
        assert grader.grade("3", "3", "math").correct


def test_any_thread_may_grade(grader: Grader) -> None:
    found: dict[int, bool] = {}

    def grade(number: int) -> None:
        found[number] = grader.grade(rf"\boxed{{{number}}}", "3", "math").correct

    threads = [threading.Thread(target=grade, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: number == 3 for number in range(6)}


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_does_not_reply_is_replaced(sent: signal.Signals) -> None:
    with Grader(seconds=4) as grader:
        assert grader.grade("3", "3", "math").correct
        assert grader._process is not None
        os.kill(grader._process.pid, sent)
        lost = grader.grade(r"\boxed{3}", "3", "math")
        assert lost.failed and not lost.correct and lost.answer == r"\boxed{3}"
        assert grader.grade("3", "3", "math").correct


def test_among_many_open_files() -> None:
    """As a rank of many process groups has them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while opened.enter_context(open(os.devnull)).fileno() < 1024:
            pass
        with Grader() as grader:
            assert grader.grade("3", "3", "math").correct


def test_a_process_that_cannot_be_started_is_no_wrong_answer() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with Grader() as grader, pytest.raises(OSError, match="Too many open files"):
            grader.grade("3", "3", "math")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader() as grader, pytest.raises(ImportError, match="install archscale-megatron"):
        grader.grade("3", "3", "math")
