"""Custom rewards in real child processes: whatever one does, the run goes on and nothing stays behind."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

from retrain.errors import ConfigError
from retrain.rewards import custom, sandbox
from retrain.types import Message, Rollout, Task

MODULE = r"""
import asyncio, ctypes, json, os, re, subprocess, sys, threading, time
print("noise while importing")

def match(response, reference): print("noise " * 3); return float(response == reference)
def boom(response, reference):
    print("about to fail")
    raise ValueError("boom\nsecond line")
def nan(response, reference): return float("nan")
def infinite(response, reference): return {"a": float("inf")}
def nothing(response, reference): pass
def text(response, reference): return "1.0"
def leaves(response, reference): sys.exit(0)
def hard_exit(response, reference): print("last words", flush=True); os._exit(3)
def segfault(response, reference): ctypes.string_at(0)
def aborts(response, reference): os.abort()
def kills_itself(response, reference): os.kill(os.getpid(), 9)
def notes_and_dies(response, reference):
    with open(response, "a") as notes: notes.write("x")
    os.kill(os.getpid(), 9)
def recursion(response, reference): return recursion(response, reference)
def stack(response, reference):
    sys.setrecursionlimit(10**9)
    def down(x): return repr([x]) if x is None else down.__call__(Bad())
    class Bad:
        def __repr__(self): return repr([self])
    return repr(Bad())
def hungry(response, reference):
    held = []
    while True: held.append(bytearray(os.urandom(1 << 16) * 512))
def flood(response, reference):
    for _ in range(3000): print("x" * 2000)
    return 1.0
def closes_everything(response, reference): os.closerange(0, 256)
def writes_everywhere(response, reference):
    for fd in range(3, 30):
        try: os.write(fd, b'{"id": 2, "reward": NaN, "parts": {}}\n')
        except OSError: pass
    return 1.0
def wide(response, reference): return {"x" * (2 << 20): 1.0}

def hold_interpreter(response, reference): return sum(range(10**13))
def regex(response, reference): return float(bool(re.match("(a+)+$", "a" * 60 + "b")))
def sleeps(response, reference): time.sleep(1000)
def deaf(response, reference):
    import signal
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True: pass
async def sleeps_async(response, reference): await asyncio.sleep(1000)
def reads_input(response, reference): return float(len(sys.stdin.read()))

def some_hang(response, reference):
    if response == "hang": time.sleep(1000)
    if response == "die": os._exit(1)
    if response == "raise": raise ValueError(response)
    return float(response)
def random_wait(response, reference):
    time.sleep(int.from_bytes(os.urandom(1), "big") / 255 * 0.03)
    return float(response)
def my_pid(response, reference): return float(os.getpid())
def spawns(response, reference):
    child = subprocess.Popen(["sleep", "1000"])
    return float(child.pid)
def threads(response, reference):
    threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()
    return 1.0
def environment(response, reference): return {k: 1.0 for k in os.environ} | {"reward": 0.0}
def hash_of(response, reference): return float(hash(response) % 1000003)
def inspects(response, reference, task, info, rollout):
    return {
        "draw": task.draw, "k": info["k"], "same": info["k"] == task.info["k"], "roles": len(task.messages),
        "ids": int(rollout.token_ids_T.sum()), "sampled": int(rollout.sampled_T.sum()),
        "nan": bool(rollout.logprobs_T[0] != rollout.logprobs_T[0]), "logprob": rollout.logprobs_T[1],
        "member": rollout.member, "float32": rollout.logprobs_T.dtype == "float32",
        "stop": rollout.stop == "length",
    }
loops = set()
async def keeps_its_loop(response, reference):
    await asyncio.sleep(0)
    loops.add(id(asyncio.get_running_loop()))
    return float(len(loops))
"""

TASK = Task(
    "t/0",
    (Message("system", "s"), Message("user", "q")),
    "5",
    "t",
    9,
    MappingProxyType({"k": 3, "names": ["a"]}),
)


def rollout(text: str, member: int = 0, error: str = "") -> Rollout:
    ids, sampled = np.array([1, 2], np.int32), np.array([False, True])
    logprobs = np.array([np.nan, -0.1], np.float32)
    stop = "error" if error else "length"
    return Rollout("t/0", member, ids, sampled, logprobs, None, text, stop, 0, error=error)


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "sandboxed_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("sandboxed_rewards", None)


@pytest.fixture
def make(module):
    made = []

    def build(
        function: str, *, timeout_s: float = 20.0, isolate: bool = True, name: str = "sandboxed_rewards"
    ):
        settings = SimpleNamespace(
            custom_module=name, custom_function=function, timeout_s=timeout_s, isolate=isolate
        )
        made.append(custom.build(SimpleNamespace(reward=settings), None))
        return made[-1]

    yield build
    for reward in made:
        reward.close()
        reward.close()


def score(reward, *texts: str):
    return asyncio.run(reward.score(TASK, [rollout(t, i) for i, t in enumerate(texts)]))


def pids(reward) -> tuple[int, ...]:
    return reward._runner._sandbox.pids()


def is_gone(pid: int) -> bool:
    """No such process, or one that only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until_gone(*which: int, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not all(is_gone(p) for p in which):
        assert time.monotonic() < until, f"{[p for p in which if not is_gone(p)]} still live"
        time.sleep(0.02)


def test_prints_do_not_disturb_the_scores(make, capfd):
    scores = score(make("match"), "5", "6", "5")
    assert [s.reward for s in scores] == [1.0, 0.0, 1.0]
    assert all(s.passed is None and not s.error for s in scores)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("boom", r"ValueError: boom \(sandboxed_rewards.py:\d+\)$"),
        ("nan", "the function returned nan"),
        ("infinite", "the function returned inf as 'a'"),
        ("nothing", "the function returned None"),
        ("text", "the function returned a str"),
        ("leaves", "SystemExit: 0"),
        ("hard_exit", "died: exit code 3"),
        ("segfault", "died: killed by SIGSEGV"),
        ("aborts", "died: killed by SIGABRT"),
        ("kills_itself", "died: killed, perhaps"),
        ("recursion", "RecursionError"),
        ("stack", "died: killed by SIG|RecursionError"),
        ("closes_everything", "died|protocol|OSError"),
        ("writes_everywhere", "protocol"),
        ("wide", "longer than a mebibyte"),
    ],
)
def test_a_failure_is_a_failed_score_and_the_next_call_works(make, function, said):
    reward = make(function)
    for _ in range(2):
        (failed,) = score(reward, "5")
        assert math.isnan(failed.reward)
        assert re.search(said, failed.error), failed.error
        assert "\n" not in failed.error


@pytest.mark.parametrize("noticed", [True, False])
def test_an_idle_child_that_was_killed_costs_nothing(make, monkeypatch, noticed):
    reward = make("match")
    texts = [TASK.reference, *"abc"]
    first = score(reward, *texts)
    for _ in range(3):
        killed = pids(reward)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        if noticed:
            time.sleep(0.1)
        else:  # as if it died between the look at it and the request
            monkeypatch.setattr(sandbox._Child, "lives", lambda self: True)
        assert score(reward, *texts) == first
        wait_until_gone(*killed)
        assert not set(killed) & set(pids(reward))
    assert [s.reward for s in first] == [1.0, 0.0, 0.0, 0.0]


def test_a_call_that_kills_its_child_is_tried_twice_and_never_again(make, tmp_path):
    reward = make("notes_and_dies")
    for path, times in (
        (tmp_path / "idle", 2),
        (tmp_path / "fresh", 1),
    ):  # the first found the checked child idle
        (failed,) = score(reward, str(path))
        assert "died: killed" in failed.error
        assert len(path.read_text()) == times
        assert pids(reward) == ()


@pytest.mark.parametrize("function", ["hold_interpreter", "regex", "sleeps", "deaf", "sleeps_async"])
def test_a_hang_is_cut_at_the_deadline(make, function):
    reward = make(function, timeout_s=0.5)
    before = pids(reward)
    started = time.monotonic()
    (failed,) = score(reward, "5")
    assert time.monotonic() - started < 5
    assert failed.error == "no result within reward.timeout_s = 0.5 seconds"
    assert pids(reward) == ()
    wait_until_gone(*before)


def test_the_place_of_a_hang_is_shown(make):
    reward = make("hold_interpreter", timeout_s=1.0)
    score(reward, "5")
    assert "in hold_interpreter" in reward.first_traceback


def test_memory_is_limited(make, monkeypatch):
    monkeypatch.setattr(sandbox, "_memory_bytes", lambda: 1 << 29)
    (failed,) = score(make("hungry"), "5")
    assert "MemoryError" in failed.error or "died" in failed.error


def test_a_flood_of_output_does_not_block(make):
    assert score(make("flood"), "5")[0].reward == 1.0


def test_there_is_no_input_to_wait_for(make):
    assert score(make("reads_input", timeout_s=5), "5")[0].reward == 0.0


def test_the_first_traceback_is_kept_for_the_message(make):
    reward = make("boom")
    score(reward, "5", "6")
    assert "sandboxed_rewards.py" in reward.first_traceback
    assert "raise ValueError" in reward.first_traceback
    assert "second line" in reward.first_traceback
    assert "sandbox_child" not in reward.first_traceback
    reward = make("hard_exit")
    score(reward, "5")
    assert "last words" in reward.first_traceback
    reward = make("match")
    score(reward, "5")
    assert reward.first_traceback == ""


def test_one_failure_does_not_touch_the_others(make):
    reward = make("some_hang", timeout_s=2.0)
    scores = score(reward, "1", "hang", "2", "die", "raise", "3")
    assert [s.reward for s in scores if not s.error] == [1.0, 2.0, 3.0]
    assert [bool(s.error) for s in scores] == [False, True, False, True, True, False]


def test_an_errored_rollout_keeps_its_own_error(make):
    rollouts = [rollout("5"), rollout("", error="the engine said no"), rollout("6")]
    scores = asyncio.run(make("match").score(TASK, rollouts))
    assert [s.error for s in scores] == ["", "the engine said no", ""]
    assert [s.reward for s in scores if not s.error] == [1.0, 0.0]


def test_scores_keep_their_order_whatever_order_they_end_in(make):
    reward = make("random_wait")
    texts = [str(i) for i in range(24)]

    async def groups():
        made = [[rollout(t) for t in texts[i::3]] for i in range(3)]
        return await asyncio.gather(*(reward.score(TASK, g) for g in made))

    for i, scores in enumerate(asyncio.run(groups())):
        assert [s.reward for s in scores] == [float(t) for t in texts[i::3]]


@pytest.mark.parametrize("isolate", [True, False])
def test_a_function_sees_task_info_and_rollout(make, isolate):
    (got,) = score(make("inspects", isolate=isolate), "5")
    assert got.error == ""
    assert dict(got.parts) == {
        "draw": 9.0, "k": 3.0, "same": 1.0, "roles": 2.0, "ids": 3.0, "sampled": 1.0, "nan": 1.0,
        "logprob": float(np.float32(-0.1)), "member": 0.0, "float32": 1.0, "stop": 1.0,
    }  # fmt: skip


def test_a_task_that_is_no_json_is_an_error_not_a_crash(make):
    reward = make("inspects")
    task = Task("t", TASK.messages, "5", "t", 0, {"k": object()})
    (failed,) = asyncio.run(reward.score(task, [rollout("5")]))
    assert "cannot be handed to a child process" in failed.error


def test_an_async_function_keeps_its_event_loop(make, monkeypatch):
    monkeypatch.setattr(sandbox, "_cores", lambda: 1)
    reward = make("keeps_its_loop")
    assert [s.reward for s in score(reward, "1", "2", "3")] == [1.0, 1.0, 1.0]
    assert [s.reward for s in score(reward, "1")] == [1.0]


def test_keys_and_tokens_stay_here(make, monkeypatch):
    for name in (
        "OPENAI_API_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PYTHONPATH",
        "MY_SETTING",
    ):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("TZ", "UTC")
    (got,) = score(make("environment"), "5")
    allowed = {*sandbox.PASSED_ON, "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "LC_CTYPE"}
    assert set(got.parts) <= allowed
    assert {"TZ", "PATH"} <= set(got.parts)


def test_the_hash_seed_is_passed_on(make, monkeypatch):
    def hashed(seed: str) -> float:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        return score(make("hash_of"), "some text")[0].reward

    assert hashed("1") == hashed("1") != hashed("2")


def test_children_are_few_and_reused_and_gone_after_close(make):
    reward = make("my_pid")
    first = {s.reward for s in score(reward, *"abcdefghijkl")}
    assert {s.reward for s in score(reward, *"abcdefghijkl")} <= first | set(map(float, pids(reward)))
    assert 1 <= len(pids(reward)) <= max(1, min(4, sandbox._cores()))
    left = pids(reward)
    reward.close()
    wait_until_gone(*left, seconds=0.1)
    (late,) = score(reward, "a")
    assert late.error == "the run ended"


def test_what_a_function_started_goes_with_it(make):
    reward = make("spawns")
    (started,) = score(reward, "5")
    assert not is_gone(int(started.reward))
    reward.close()
    wait_until_gone(int(started.reward))


def test_a_thread_left_behind_does_not_keep_a_child(make):
    reward = make("threads")
    score(reward, "5")
    left = pids(reward)
    started = time.monotonic()
    reward.close()
    assert time.monotonic() - started < 5
    wait_until_gone(*left)


def test_close_does_not_wait_for_a_hang(make):
    reward = make("hold_interpreter", timeout_s=500)

    async def abandoned():
        async with asyncio.timeout(0.5):
            await reward.score(TASK, [rollout("5"), rollout("6"), rollout("7")])

    with pytest.raises(TimeoutError):
        asyncio.run(abandoned())
    left = pids(reward)
    started = time.monotonic()
    reward.close()
    assert time.monotonic() - started < 5
    wait_until_gone(*left)


@pytest.mark.parametrize("function", ["hold_interpreter", "deaf", "my_pid"])
def test_children_die_with_a_killed_parent(module, function):
    code = f"""
import asyncio, sys, threading
from types import SimpleNamespace
sys.path.append({str(module)!r})
sys.path.append({str(Path(__file__).parent)!r})
from retrain.rewards import custom
from test_custom import TASK, rollout
settings = SimpleNamespace(
    custom_module="sandboxed_rewards", custom_function={function!r}, timeout_s=500, isolate=True
)
reward = custom.build(SimpleNamespace(reward=settings), None)
work = lambda: asyncio.run(reward.score(TASK, [rollout("5"), rollout("6")]))
threading.Thread(target=work, daemon=True).start()
while not reward._runner._sandbox.pids(): pass
import time; time.sleep(0.5)
print(*reward._runner._sandbox.pids(), flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        children = [int(p) for p in parent.stdout.readline().split()]
        assert children
        assert not any(is_gone(p) for p in children)
        parent.kill()
        wait_until_gone(*children)


def test_a_forgotten_reward_lets_the_process_end(module):
    code = f"""
import sys
from types import SimpleNamespace
sys.path.append({str(module)!r})
from retrain.rewards import custom
settings = SimpleNamespace(
    custom_module="sandboxed_rewards", custom_function="match", timeout_s=500, isolate=True
)
reward = custom.build(SimpleNamespace(reward=settings), None)
print(*reward._runner._sandbox.pids())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    wait_until_gone(*map(int, done.stdout.split()))


def test_an_interrupt_at_the_terminal_is_not_the_childrens(make):
    # Where the tests themselves run behind a shell's &, interrupts are ignored, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        reward = make("match")
    finally:
        signal.signal(signal.SIGINT, before)
    for pid in pids(reward):
        assert os.getpgid(pid) == pid != os.getpgid(0)
        os.killpg(pid, signal.SIGINT)
        wait_until_gone(pid)
    # A child that was hit all the same, while idle, costs nothing.
    assert score(reward, "5")[0].reward == 1.0


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("", "score", "needs a module"),
        ("no_such_module", "score", "'no_such_module'"),
        ("sandboxed_rewards", "score", "has no 'score'"),
        ("broken", "score", r"SyntaxError"),
        ("raises", "score", r"RuntimeError: no luck \(raises.py:1\)"),
        ("one_argument", "score", "cannot be called with"),
    ],
)
def test_a_reward_that_cannot_work_is_refused_before_anything_else(
    make, module, isolate, name, function, said
):
    (module / "broken.py").write_text("def score(:\n")
    (module / "raises.py").write_text("raise RuntimeError('no luck')\n")
    (module / "one_argument.py").write_text("def score(response): return 1.0\n")
    with pytest.raises(ConfigError, match=said) as caught:
        make(function, name=name, isolate=isolate)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    if name:
        assert f"reward.custom_module = {name!r}" in str(caught.value)


def test_a_module_that_ends_the_process_on_import_is_refused(make, module):
    (module / "exits.py").write_text("import os\nprint('bye', flush=True)\nos._exit(7)\n")
    with pytest.raises(ConfigError, match=r"exit code 7 \(bye\)"):
        make("score", name="exits")


def test_a_slow_import_is_not_a_slow_call(make, module):
    (module / "slow.py").write_text(
        "import time\ntime.sleep(1.6)\ndef score(response, reference): return 1.0\n"
    )
    assert score(make("score", name="slow", timeout_s=1.2), "5")[0].reward == 1.0


def test_a_module_beside_a_standard_one_of_ours_is_found(make, module):
    (module / "match.py").write_text("def score(response, reference): return 0.75\n")
    assert score(make("score", name="match"), "5")[0].reward == 0.75


class TestUnprotected:
    def test_it_is_announced(self, make, caplog):
        make("match", isolate=False)
        assert "reward.isolate = false" in caplog.text
        assert "unprotected" in caplog.text

    @pytest.mark.parametrize("function", ["sleeps_async", "sleeps"])
    def test_a_hang_that_lets_go_is_cut(self, make, function):
        (failed,) = score(make(function, isolate=False, timeout_s=0.2), "5")
        assert failed.error == "no result within reward.timeout_s = 0.2 seconds"

    @pytest.mark.parametrize("function", ["boom", "nan", "nothing", "text", "leaves", "recursion"])
    def test_failures_are_those_of_the_child(self, make, function):
        (here,), (there,) = score(make(function, isolate=False), "5"), score(make(function), "5")
        assert here.error == there.error

    @pytest.mark.parametrize("trackers", [1, 3])
    def test_a_trackers_exit_in_the_place_of_sys_exit_is_not_where_the_reward_left(
        self, make, monkeypatch, trackers
    ):
        def around(inner):
            def exit(code=0):
                inner(code)

            return exit

        wrapped = sys.exit
        for _ in range(trackers):
            wrapped = around(wrapped)
        monkeypatch.setattr(sys, "exit", wrapped)
        (here,), (there,) = score(make("leaves", isolate=False), "5"), score(make("leaves"), "5")
        assert here.error == there.error

    def test_order_and_cancellation(self, make):
        reward = make("random_wait", isolate=False)
        assert [s.reward for s in score(reward, *"123")] == [1.0, 2.0, 3.0]

        async def abandoned():
            async with asyncio.timeout(0.1):
                await make("sleeps_async", isolate=False).score(TASK, [rollout("5")])

        with pytest.raises(TimeoutError):
            asyncio.run(abandoned())
