"""Sessions shared by threads: runs at the precision they began with, changes that race or fail, memory, threads."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
from helpers_programs import plain_program, residual_program

import bitstrata_runtime
from bitstrata_runtime import ArtifactError, ProgramError, Session, derive, load
from bitstrata_runtime.artifact import write
from bitstrata_runtime.plan import Conv
from bitstrata_runtime.reference import OracleExecutor, ReferenceExecutor

ENGINE = bool(bitstrata_runtime.available_isas())
needs_engine = pytest.mark.skipif(not ENGINE, reason="the engine is not built")
CHOICES = (2, 4, 8, "mixed", {"stem": 2, "block.conv": 8, "head": 4})


def inputs(seed: int = 0, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (count, 2, 5, 5))


def name(choice) -> str:
    return str(choice)


def references(x: np.ndarray) -> dict[str, bytes]:
    """The output of every choice by the reference executor."""
    found = {
        name(c): Session.from_program(residual_program(), c, executor="reference").run_raw(x, floats=True)
        for c in CHOICES
    }
    return {key: value.tobytes() for key, value in found.items()}


@pytest.fixture
def path(tmp_path):
    write(residual_program(), tmp_path / "net.strata")
    return tmp_path / "net.strata"


def together(*bodies) -> None:
    """Run the bodies at the same time; an error in any is an error here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(bodies))

    def guarded(body) -> None:
        try:
            start.wait()
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def switch_while_running(session: Session, switches: int, threads: tuple[int, ...]) -> dict[str, int]:
    """Change the precision at random from one thread while four others run; how often each precision ran.

    Every output must be exactly the reference's at the precision that its run reports.
    """
    batches = [inputs(seed, count) for seed, count in enumerate((1, 2, 7, 3))]
    expected = [references(x) for x in batches]
    assert all(len(set(one.values())) == len(CHOICES) for one in expected)
    over = threading.Event()
    counts = [dict.fromkeys(map(name, CHOICES), 0) for _ in batches]

    def run(i: int) -> None:
        generator = random.Random(i)
        while not over.is_set():
            if generator.random() < 0.5:
                found = session.run_raw(batches[i], floats=True)
                assert found.tobytes() in expected[i].values()
                continue
            snapshot = session.at() if generator.random() < 0.8 else session.at(generator.choice(CHOICES))
            found = snapshot.run_raw(batches[i], floats=True)
            assert found.tobytes() == expected[i][name(snapshot.precision)]
            counts[i][name(snapshot.precision)] += 1

    def switch() -> None:
        generator = random.Random(99)
        try:
            for k in range(switches):
                choice = generator.choice(CHOICES)
                session.set_precision(choice)
                assert name(session.at().precision) == name(choice)
                if k % 50 == 0:
                    session.set_threads(generator.choice(threads))
                if k % 333 == 0:
                    session.release()
                if k % 20 == 0:
                    time.sleep(0)  # so that the others come to run on a machine with few processors
        finally:
            over.set()

    together(switch, *(lambda i=i: run(i) for i in range(len(batches))))
    return {key: sum(one[key] for one in counts) for key in counts[0]}


@needs_engine
def test_precision_changes_while_others_run(path):
    counts = switch_while_running(load(path, keep=5), 3000, (1, 2))
    assert sum(counts.values()) > 20
    assert sum(count > 0 for count in counts.values()) >= 3


@needs_engine
@pytest.mark.soak
@pytest.mark.parametrize(("keep", "switches"), [(5, 10_000), (3, 10_000), (1, 1_000)])
def test_precision_changes_ten_thousand_times_while_others_run(path, keep, switches):
    counts = switch_while_running(load(path, keep=keep), switches, (1, 2, 3))
    assert all(count > 0 for count in counts.values())


class Gate:
    """An executor factory whose executors wait to be let through, and tell that they wait."""

    def __init__(self, monkeypatch):
        self.entered, self.let = threading.Event(), threading.Event()
        gate = self

        class Gated(OracleExecutor):
            def run(self, codes):
                gate.entered.set()
                assert gate.let.wait(10)
                return super().run(codes)

        monkeypatch.setattr("bitstrata_runtime.backend.OracleExecutor", Gated)


def test_a_run_under_way_finishes_at_its_precision(monkeypatch, path):
    gate, x = Gate(monkeypatch), inputs()
    session = load(path, 2, executor="oracle", keep=1)
    found = []
    runner = threading.Thread(target=lambda: found.append(session.run_raw(x, floats=True)))
    runner.start()
    assert gate.entered.wait(10)
    session.set_precision(8)  # does not wait for the run, and drops what it uses
    assert session.at().precision == 8
    assert found == []
    gate.let.set()
    runner.join()
    assert found[0].tobytes() == references(x)["2"]
    assert session.run_raw(x, floats=True).tobytes() == references(x)["8"]


def test_ready_precisions_are_changed_to_while_another_is_read(monkeypatch, path):
    session, x = load(path, 2, executor="oracle"), inputs()
    expected = references(x)
    session.set_precision(4)
    reading, go_on = threading.Event(), threading.Event()

    def slow(program, bits):
        reading.set()
        assert go_on.wait(10)
        return derive(program, bits)

    monkeypatch.setattr("bitstrata_runtime.session.derive", slow)
    loader = threading.Thread(target=lambda: session.at(8))
    loader.start()
    assert reading.wait(10)
    session.set_precision(2)
    assert session.run_raw(x, floats=True).tobytes() == expected["2"]
    go_on.set()
    loader.join()
    assert session.at().precision == 2
    assert session.at(8).run_raw(x, floats=True).tobytes() == expected["8"]


def test_two_threads_that_want_the_same_precision_read_it_once(monkeypatch, path):
    made = []

    class Counting(OracleExecutor):
        def __init__(self, plan):
            made.append(plan)
            super().__init__(plan)

    monkeypatch.setattr("bitstrata_runtime.backend.OracleExecutor", Counting)
    session = load(path, 2, executor="oracle")
    together(*[lambda: session.set_precision(8)] * 6)
    assert len(made) == 2
    files = [file for file, _ in session.reads]
    assert len(files) == len(set(files))


def test_upgrades_that_race_leave_the_higher_precision_or_raise(path):
    """An upgrade is one from the precision that is present when it takes place."""
    for _ in range(20):
        session = load(path, 2, executor="oracle")
        refused = []

        def upgrade(bits, session=session, refused=refused):
            try:
                session.upgrade(bits)
            except ProgramError as error:
                refused.append(str(error))

        together(lambda u=upgrade: u(4), lambda u=upgrade: u(8))
        assert session.at().precision == 8
        assert refused in (
            [],
            ["upgrade: 4 is no upgrade from the present precision 8; use set_precision for any other change"],
        )
        assert session.run_raw(inputs(), floats=True).tobytes() == references(inputs())["8"]


def test_failures_amid_other_changes_leave_a_consistent_session(path):
    session, x = load(path, 2, executor="oracle"), inputs()
    expected = references(x)
    file = path / "factors-8.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    def fail() -> None:
        for _ in range(20):
            with pytest.raises(ArtifactError, match="factors-8"):
                session.set_precision(8)
            with pytest.raises(ProgramError, match="there is no 3"):
                session.set_precision(3)

    def change() -> None:
        for i in range(40):
            session.set_precision((4, 2)[i % 2])

    def run() -> None:
        for _ in range(40):
            snapshot = session.at()
            assert snapshot.precision in (2, 4)
            assert snapshot.run_raw(x, floats=True).tobytes() == expected[name(snapshot.precision)]

    together(fail, change, run)
    file.write_bytes(good)
    session.set_precision(8)
    assert session.run_raw(x, floats=True).tobytes() == expected["8"]


# Snapshots, release, memory


def test_a_snapshot_stays_what_it_is(path):
    session, x = load(path, 2, executor="oracle", keep=1), inputs()
    expected = references(x)
    snapshots = [session.at(), *(session.at(choice) for choice in CHOICES[1:])]
    assert session.at().precision == 2
    session.set_precision(8)
    session.release()
    for choice, snapshot in zip(CHOICES, snapshots, strict=True):
        assert snapshot.precision == choice
        assert snapshot.run_raw(x, floats=True).tobytes() == expected[name(choice)]
        assert (
            snapshot.precision_map == Session.from_program(residual_program(), choice, executor="oracle").precision_map
        )
    plan = derive(residual_program(), 4)
    scale = plan.values[plan.output].scale
    np.testing.assert_array_equal(
        snapshots[1].run(x, floats=True),
        (snapshots[1].run_raw(x, floats=True) * scale).astype(np.float32),
    )
    everything = ReferenceExecutor(plan).run_all(snapshots[1].encode(x, floats=True))
    for key, value in snapshots[1].run_all(x, floats=True).items():
        np.testing.assert_array_equal(value, everything[key])


def test_one_choice_in_several_forms_is_prepared_once():
    session = Session.from_program(plain_program(), 2, executor="oracle")
    assert session.at(2) is session.at({"stem": 2, "mid": 2, "head": 2}) is session.at()
    for wrong in (True, 2.0, "2", None.__class__):
        with pytest.raises(ProgramError, match="precision"):
            session.at(wrong)


def test_release_forgets_precisions_but_not_the_present_one():
    session = Session.from_program(plain_program(), 1, executor="oracle", keep=4)
    others = {bits: session.at(bits) for bits in (2, 3, 4)}
    session.release(3)
    assert session.at(2) is others[2]
    assert session.at(3) is not others[3]
    with pytest.raises(ProgramError, match="release: 1 is the present precision; change it first"):
        session.release(1)
    with pytest.raises(ProgramError, match="there is no 9"):
        session.release(9)
    session.release()
    assert [one for one, _ in session.memory.packed] == [1]
    assert session.at(2) is not others[2]


@needs_engine
def test_memory_is_what_the_parts_hold():
    program, x = residual_program(), inputs()
    session = Session.from_program(program, 2)
    alone = session.memory
    assert [one for one, _ in alone.packed] == [2]
    assert alone.packed[0][1] == session.at().executor.constant_bytes > 0
    codes = [op.codes for op in session.plan.ops if isinstance(op, Conv)]
    held = {id(weights.codes): weights.codes.nbytes for weights in program.weights.values()}
    shared = [any(np.shares_memory(c, w.codes) for w in program.weights.values()) for c in codes]
    assert alone.codes == sum(held.values()) + sum(c.nbytes for c, s in zip(codes, shared, strict=True) if not s)
    assert alone.workspaces == session.at().executor.run_bytes > 0
    assert alone.total == alone.codes + alone.packed[0][1] + alone.workspaces
    session.run(x, floats=True)
    assert session.memory == alone
    session.set_threads(3)
    assert session.memory.workspaces == 3 * alone.workspaces
    session.set_threads(1)
    session.at(8)
    both = session.memory
    assert [one for one, _ in both.packed] == [2, 8]
    session.release()
    assert session.memory == alone
    assert both.total > alone.total


def test_numpy_executors_hold_codes_only():
    session = Session.from_program(residual_program(), 2, executor="oracle")
    assert session.memory.packed == ((2, 0),)
    assert session.memory.workspaces == 0
    assert session.memory.total == session.memory.codes > 0


# Threads


@needs_engine
def test_threads_change_at_any_time_and_no_result():
    program, x = residual_program(), inputs(count=9)
    session = Session.from_program(program, 4, threads=2)
    expected = session.run_all(x, floats=True)
    for threads in (1, 3, 2, 5):
        session.set_threads(threads)
        assert session.threads == threads
        for key, value in session.run_all(x, floats=True).items():
            np.testing.assert_array_equal(value, expected[key])


@pytest.mark.parametrize("executor", ["oracle", pytest.param("engine", marks=needs_engine)])
@pytest.mark.parametrize("threads", [0, -1, 1.0, True, "2"])
def test_wrong_numbers_of_threads(executor, threads):
    session = Session.from_program(plain_program(), 1, executor=executor, threads=2)
    with pytest.raises(ValueError, match=f"threads = {threads!r}: must be a positive integer"):
        session.set_threads(threads)
    assert session.threads == 2


@needs_engine
def test_more_threads_than_the_engine_has_room_for():
    session = Session.from_program(plain_program(), 1, threads=2)
    with pytest.raises(ValueError, match=r"threads is 257, not in 1\.\.256"):
        session.set_threads(257)
    assert session.threads == 2
