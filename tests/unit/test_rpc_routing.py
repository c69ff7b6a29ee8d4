"""Who gets a request, under a clock that only the test moves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest

from kdmesh.rpc.fleet.routing import Router, RoutingPolicy
from kdmesh.rpc.fleet.sent_tokens import SentTokens
from kdmesh.types import ServerLoad

LONG_AGO_S = -1000.0  # joined then, a server is no new one at 0


def router(names: Iterable[str], *, local: str = "", seed: int = 0, **policy: float) -> Router:
    made = Router(RoutingPolicy(**policy), random.Random(seed))  # type: ignore[arg-type]
    for name in names:
        made.join(name, LONG_AGO_S, is_local=name == local)
    return made


def say(made: Router, name: str, waiting_tokens: int, now_s: float = 0.0, *, tokens_per_s: float = 1000.0) -> None:
    made.reported(name, ServerLoad(waiting_tokens=waiting_tokens, tokens_per_s=tokens_per_s), now_s)


def free(made: Router, names: Iterable[str], now_s: float) -> list[str]:
    return [name for name in names if made.barred_s(name, now_s) == 0]


def answer(made: Router, name: str, now_s: float, *, took_s: float = 0.1) -> None:
    made.answered(made.sent(name, 10, now_s - took_s), now_s)


def test_the_one_with_the_least_to_do_gets_the_request_whoever_gave_it_the_rest() -> None:
    made = router("ab")
    say(made, "a", 5000)
    say(made, "b", 2000)
    assert made.best("ab", 100, 0.0) == "b"
    made.sent("b", 4000, 0.0)  # is not in its report yet
    assert made.best("ab", 100, 0.0) == "a"


def test_a_slow_server_counts_for_what_it_can_do() -> None:
    made = router("ab")
    say(made, "a", 3000, tokens_per_s=400)
    say(made, "b", 5000, tokens_per_s=1600)
    assert made.best("ab", 1000, 0.0) == "b"


def test_speeds_that_are_about_equal_are_taken_for_the_same() -> None:
    made = router("ab")
    say(made, "a", 1000, tokens_per_s=1000)
    say(made, "b", 1050, tokens_per_s=1100)
    assert made.best("ab", 10, 0.0) == "a"


def test_a_report_gets_old_as_the_server_goes_on() -> None:
    made = router("ab")
    say(made, "a", 5000, now_s=0.0)
    say(made, "b", 2000, now_s=4.0)
    assert made.best("ab", 100, 4.0) == "a"


def test_without_reports_own_requests_decide() -> None:
    made = router("ab")
    request = made.sent("a", 100, 0.0)
    assert made.best("ab", 10, 0.0) == "b"
    made.sent("b", 200, 0.0)
    assert made.best("ab", 10, 0.0) == "a"
    made.unanswered(request, 1.0, is_its_fault=False)
    made.sent("a", 199, 1.0)
    assert made.best("ab", 10, 1.0) == "a"


def test_of_those_with_nothing_to_do_the_one_that_did_least_is_taken() -> None:
    made = router("ab")
    for name, recent in (("a", 5000.0), ("b", 4000.0)):
        made.reported(name, ServerLoad(waiting_tokens=0, tokens_per_s=1000, recent_tokens=recent), 0.0)
    assert {made.best("ab", 10, 0.0) for _ in range(20)} == {"b"}
    say(made, "b", 1)
    assert made.best("ab", 10, 0.0) == "a"


def test_a_server_that_has_measured_no_speed_yet_counts_as_a_usual_one() -> None:
    made = router("ab")
    made.reported("a", ServerLoad(waiting_tokens=100, tokens_per_s=None), 0.0)
    say(made, "b", 200, tokens_per_s=4000)
    assert made.best("ab", 10, 0.0) == "a"


def test_a_report_is_relied_on_for_a_moment() -> None:
    made = router("a", fresh_s=0.02)
    assert not made.is_known("a", 10.0)
    say(made, "a", 0, now_s=10.0)
    assert made.is_known("a", 10.01)
    assert not made.is_known("a", 10.03)


def test_equals_are_drawn_by_lot() -> None:
    made = router("ab")
    assert len({made.best("ab", 10, 0.0) for _ in range(50)}) == 2


def test_a_server_of_this_node_is_preferred_up_to_a_bound() -> None:
    made = router("abcdefgh", local="h", local_tokens=1000)
    assert all("h" in made.draw("abcdefgh", 0.0) for _ in range(20))
    say(made, "a", 0)
    say(made, "h", 999)
    assert made.best("ah", 500, 0.0) == "h"
    say(made, "h", 1001)
    assert made.best("ah", 500, 0.0) == "a"


def test_few_are_compared_so_that_not_everybody_finds_the_same() -> None:
    names = [f"s{k}" for k in range(64)]
    chosen = Counter()
    for rank in range(1024):  # all at the same moment, each with the same reports
        made = router(names, seed=rank, choices=3)
        for k, name in enumerate(names):
            say(made, name, 100 * k)
        chosen[made.best(made.draw(names, 0.0), 10, 0.0)] += 1
    assert max(chosen.values()) < 100  # all of 1024, if each compared all


def test_a_new_server_gets_little_at_first_and_its_share_later() -> None:
    made = router("ab", choices=2, slow_start_s=30)
    made.join("new", 0.0, is_local=False)
    shares = []
    for now_s in (0.0, 15.0, 30.0):
        for name in "ab":
            say(made, name, 10_000, now_s)
        say(made, "new", 0, now_s)
        drawn = [made.draw(("a", "b", "new"), now_s) for _ in range(600)]
        shares.append(sum(made.best(names, 10, now_s) == "new" for names in drawn) / 600)
    assert shares[0] < 0.15  # it has nothing to do, and still
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.6


def test_a_new_server_of_this_node_starts_slowly_too() -> None:
    made = router("ab", choices=2, slow_start_s=30)
    made.join("near", 0.0, is_local=True)
    times = sum("near" in made.draw(("a", "b", "near"), 0.0) for _ in range(600))
    assert times < 120
    assert all(made.draw(("near",), 0.0) == ["near"] for _ in range(20))  # whom else


def test_failures_in_a_row_eject_and_one_good_answer_lets_it_return_slowly() -> None:
    made = router("abc", max_failures=3, ejected_s=5, slow_start_s=30)
    for _ in range(2):
        made.unanswered(made.sent("a", 10, 0.0), 0.0, is_its_fault=True)
    answer(made, "a", 0.0)  # not in a row any more
    for _ in range(2):
        made.unanswered(made.sent("a", 10, 0.0), 0.0, is_its_fault=True)
    assert free(made, "abc", 0.0) == ["a", "b", "c"]
    made.failed("a", 0.0)
    assert free(made, "abc", 4.9) == ["b", "c"]
    assert made.barred_s("a", 4.0) == pytest.approx(1.0)

    assert made.is_on_trial("a")
    assert free(made, "abc", 5.0) == ["a", "b", "c"]
    trial = made.sent("a", 10, 5.0)
    assert free(made, "abc", 5.0) == ["b", "c"]  # one at a time
    made.answered(trial, 6.0)
    assert not made.is_on_trial("a")
    drawn = Counter(name for _ in range(600) for name in made.draw("abc", 6.0))
    assert drawn["a"] < 0.2 * drawn["b"]


def test_a_trial_that_fails_takes_it_out_for_twice_as_long() -> None:
    made = router("ab", max_failures=1, ejected_s=5, longest_ejected_s=12)
    times = []
    now_s = 0.0
    for _ in range(4):
        made.failed("a", now_s)
        times.append(made.barred_s("a", now_s))
        now_s += times[-1]
    assert times == pytest.approx([5, 10, 12, 12])


def test_answers_that_take_far_longer_than_the_others_eject() -> None:
    made = router("abc", slow_factor=5, slow_by_s=1)
    for _ in range(10):
        answer(made, "a", 0.0, took_s=1.0)
        answer(made, "b", 0.0, took_s=1.2)
        answer(made, "c", 0.0, took_s=4.0)
    assert free(made, "abc", 0.0) == ["a", "b", "c"]
    for _ in range(10):
        answer(made, "c", 0.0, took_s=9.0)
    assert free(made, "abc", 0.0) == ["a", "b"]


def test_of_two_servers_the_far_slower_one_is_ejected() -> None:
    made = router("ab", slow_factor=5, slow_by_s=1)
    for _ in range(10):
        answer(made, "a", 0.0, took_s=1.0)
        answer(made, "b", 0.0, took_s=20.0)
    assert free(made, "ab", 0.0) == ["a"]


def test_what_makes_all_of_them_late_ejects_nobody() -> None:
    made = router("abc", slow_factor=5, slow_by_s=1)
    for _ in range(10):
        for name, took_s in (("a", 20.0), ("b", 20.0), ("c", 60.0)):
            answer(made, name, 0.0, took_s=took_s)
    assert free(made, "abc", 0.0) == ["a", "b", "c"]


def test_a_server_that_becomes_slow_after_many_good_answers_is_soon_found_out() -> None:
    made = router("abc", slow_factor=5, slow_by_s=1)
    for name, count in (("a", 20), ("b", 20), ("c", 200)):
        for _ in range(count):
            answer(made, name, 0.0, took_s=1.0)
    answer(made, "c", 0.0, took_s=20.0)  # once is no habit
    assert free(made, "abc", 0.0) == ["a", "b", "c"]
    for _ in range(9):
        answer(made, "c", 0.0, took_s=20.0)
    assert free(made, "abc", 0.0) == ["a", "b"]


def test_requests_that_were_given_up_or_refused_for_now_are_no_failures() -> None:
    made = router("ab", max_failures=1)
    for _ in range(10):
        made.unanswered(made.sent("a", 10, 0.0), 0.0, is_its_fault=False)
    made.sent("a", 10, 0.0)
    assert free(made, "ab", 0.0) == ["a", "b"]


def test_a_long_queue_and_a_low_speed_explain_a_late_answer() -> None:
    made = router("abc", slow_factor=5, slow_by_s=1)
    for _ in range(10):
        answer(made, "a", 0.0, took_s=1.0)
        answer(made, "b", 0.0, took_s=1.0)
        say(made, "c", 4000, tokens_per_s=200)
        answer(made, "c", 0.0, took_s=25.0)
    assert free(made, "abc", 0.0) == ["a", "b", "c"]


def test_never_more_than_half_are_ejected() -> None:
    made = router("abcd", max_failures=1)
    for name in "abcd":
        made.failed(name, 0.0)
    assert len(free(made, "abcd", 0.0)) == 2
    made.leave("c")
    made.leave("d")
    assert free(made, "ab", 0.0) == ["a", "b"]  # nobody else is left


def test_a_request_of_one_that_left_and_came_back_does_not_count_for_the_new() -> None:
    made = router("ab")
    request = made.sent("a", 1000, 0.0)
    made.leave("a")
    made.join("a", LONG_AGO_S, is_local=False)
    made.sent("a", 500, 0.0)
    made.sent("b", 600, 0.0)
    made.unanswered(request, 0.0, is_its_fault=False)
    assert made.best("ab", 10, 0.0) == "a"
    made.sent("a", 200, 0.0)
    assert made.best("ab", 10, 0.0) == "b"


def test_imbalance_is_most_over_mean_of_what_was_sent_lately() -> None:
    sent = SentTokens(60)
    assert sent.imbalance("ab", 0.0) is None
    sent.add("a", 300, 0.0)
    sent.add("b", 100, 1.0)
    assert sent.imbalance("ab", 59.0) == pytest.approx(1.5)
    assert sent.imbalance("a", 59.0) is None  # one server is even with itself
    assert sent.imbalance("ab", 60.0) == pytest.approx(2.0)
    assert sent.imbalance("ab", 61.0) is None
