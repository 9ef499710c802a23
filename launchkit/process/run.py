"""``launch_run``: a plan's candidate carried out, and what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launchkit.diagnosis.rules import signal_name
from launchkit.errors import IllegalScenarioError, LaunchError, MissingExtraError, UsageError
from launchkit.hardware import Backend, Cluster
from launchkit.hub.local import gguf_in
from launchkit.launch.build import BuiltIn, Launcher, Script, build_command, child_environment, local_ranks, nodes_of
from launchkit.launch.command import DEFAULT_MASTER_PORT, Command, Engine, Nodes
from launchkit.launch.devices import require_devices
from launchkit.launch.environment import recorded_environment
from launchkit.launch.job import Data, job_notes, split_gguf
from launchkit.launch.record import RankRecord, RunRecord, predicted_values, rank_record, strategy_is_live
from launchkit.plan import Candidate, Plan
from launchkit.process.evidence import COMMAND_FILE, PROCESS_FILE, RESULT_FILE, own_process
from launchkit.process.extensions import stale_locks
from launchkit.process.failure import Failure, find_failure
from launchkit.process.ports import free_port, is_free
from launchkit.process.supervisor import Outcome, Supervision, supervise
from launchkit.process.worker import PROGRESS_LOG
from launchkit.scenario import Method, Trainer
from launchkit.serialize import document_text, plan_document

RUNS_DIR = Path("runs")
MAXIMUM_SAME_NAMES = 1000


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to run and how, besides the plan.

    ``script`` is the user's own; without one the built-in fine-tune trains on ``data``. ``run_dir`` is a wish: one that
    exists gets a number. ``pad_to_seq_len`` of None means: in a trial (``max_steps`` given), so that the measured peak
    is the planned one. ``measure`` of None means: profile on the CPU, counters elsewhere. ``node_rank``,
    ``master_addr``, ``master_port`` and ``hostfile`` matter on several nodes; each node runs the same command with its
    own rank. ``stream`` receives live what rank 0 tells, which of a script is all its output and of the built-in
    fine-tune its progress; None keeps it in the logs.
    """

    script: str | None = None
    script_args: tuple[str, ...] = ()
    model_path: str | None = None
    data: str | None = None
    max_steps: int = 0
    num_epochs: float = 1.0
    pad_to_seq_len: bool | None = None
    run_dir: str | None = None
    engine: Engine | None = None
    measure: str | None = None
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    hostfile: str = ""
    grace_seconds: float = 15.0
    dry_run: bool = False
    stream: BinaryIO | None = None


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run before it starts: what ``--dry-run`` prints. Nothing has been written yet."""

    run_dir: Path
    candidate: Candidate
    nodes: Nodes
    command: Command
    is_built_in: bool


def launch_run(plan: Plan, *, options: RunOptions, candidate: Candidate | None = None) -> RunRecord:
    """Carries out ``plan.chosen`` (or another ``candidate`` of the plan) and returns what was measured.

    Raises a ``LaunchkitError`` for what is wrong before anything starts. A run that fails is a record with its exit
    code and failure. Interrupted, it returns when every process is gone, with exit code 130 (or 128 + signal).
    """
    prepared = prepare_run(plan, options=options, candidate=candidate)
    if options.dry_run:
        return _record(prepared, exit_code=0, seconds=0.0, dry_run=True)
    _refuse_stale_locks(prepared.candidate)
    _require_devices(plan, prepared)
    prepared = _with_new_directory(prepared, plan, options)
    environment = child_environment(os.environ, prepared.command.environment)
    _write_inputs(prepared, plan, environment)
    log_dir = prepared.run_dir / "logs"
    ranks = local_ranks(prepared.nodes)
    outcome = supervise(
        prepared.command.argv,
        environment=environment,
        how=Supervision(
            log_dir=log_dir,
            live_log=PROGRESS_LOG if prepared.is_built_in else f"rank{ranks[0]}.log",
            stream=options.stream,
            grace_seconds=options.grace_seconds,
        ),
    )
    failure = find_failure(log_dir, outcome=outcome, ranks=ranks)
    return _finish(prepared, outcome=outcome, failure=failure, ranks=ranks)


def prepare_run(plan: Plan, *, options: RunOptions, candidate: Candidate | None = None) -> PreparedRun:
    """Checks everything that can be checked and builds the command; writes nothing."""
    chosen = candidate or plan.chosen
    if chosen is None:
        raise IllegalScenarioError("the plan found nothing that fits; take one of its suggestions, or more GPUs")
    target = _target(chosen, plan, options)
    launcher = _launcher(chosen, plan.cluster, options)
    run_dir = _fresh_directory(options.run_dir, chosen)
    command = build_command(chosen, plan.cluster, target=target, run_dir=str(run_dir), launcher=launcher)
    _require_packages(chosen, target)  # behind what no package mends
    nodes = nodes_of(chosen, plan.cluster, launcher)
    is_built_in = isinstance(target, BuiltIn)
    return PreparedRun(run_dir=run_dir, candidate=chosen, nodes=nodes, command=command, is_built_in=is_built_in)


def _target(candidate: Candidate, plan: Plan, options: RunOptions) -> BuiltIn | Script:
    if options.script is not None:
        if not Path(options.script).is_file():
            raise UsageError(f"{options.script} is not a file; give the path of a Python script")
        return Script(path=str(Path(options.script).resolve()), args=options.script_args)
    if options.data is None:
        raise UsageError("the built-in fine-tune has no data; pass --data FILE.jsonl, or a script of your own")
    if not Path(options.data).is_file():
        raise UsageError(f"{options.data} is not a file; pass --data FILE.jsonl (chat, text or alpaca records)")
    is_trial = options.max_steps > 0
    data = Data(
        path=str(Path(options.data).resolve()),
        max_steps=options.max_steps,
        num_epochs=options.num_epochs,
        pad_to_seq_len=is_trial if options.pad_to_seq_len is None else options.pad_to_seq_len,
    )
    is_local = bool(options.model_path) or candidate.model.source == "local"
    return BuiltIn(model_path=_model_path(options.model_path or candidate.model.name, is_local=is_local), data=data)


def _model_path(name: str, *, is_local: bool) -> str:
    """A path as an absolute one; a hub id as it is. A directory without a configuration stands for its GGUF file."""
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.is_dir() and not (path / "config.json").is_file():
        path = gguf_in(path) or path  # the one that was planned
    if is_local and not path.exists():
        raise UsageError(f"the model {name} is not here; pass --model-path DIR, or launch where it was planned")
    return str(path.resolve()) if path.exists() else name


def _require_packages(candidate: Candidate, target: BuiltIn | Script) -> None:
    """Says which package is missing before any process starts. Looking for a package does not import it."""
    training = candidate.scenario.training
    needed = {"torch": "train", "accelerate": "train"}
    if candidate.scenario.strategy.kind.zero_stage:
        needed["deepspeed"] = "deepspeed"
    if isinstance(target, BuiltIn):
        needed["transformers"] = "train"
        if training.trainer is Trainer.TRL:
            needed |= {"trl": "train", "datasets": "train"}
        if training.method is not Method.FULL:
            needed["peft"] = "train"
        if training.method is Method.QLORA or "bnb" in training.optimizer or training.optimizer.startswith("paged"):
            needed["bitsandbytes"] = "qlora"
        if split_gguf(target.model_path)[1]:
            needed["gguf"] = "train"
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"this run needs {package}, which is not installed; pip install 'launchkit-planner[{extra}]'"
            )


def _launcher(candidate: Candidate, cluster: Cluster, options: RunOptions) -> Launcher:
    on_cpu = cluster.gpu.backend is Backend.CPU
    num_nodes = cluster.num_nodes
    if not 0 <= options.node_rank < num_nodes:
        raise UsageError(f"node rank {options.node_rank} is not one of {num_nodes} nodes; pass 0 to {num_nodes - 1}")
    if num_nodes > 1 and options.master_addr == "127.0.0.1" and options.node_rank:
        raise UsageError("node 0 is not at 127.0.0.1 seen from another node; pass --master-addr ADDRESS of node 0")
    return Launcher(
        python=sys.executable,
        engine=options.engine,
        node_rank=options.node_rank,
        master_addr=options.master_addr,
        master_port=_port(options, num_nodes=num_nodes),
        hostfile=options.hostfile,
        visible_devices="" if on_cpu else os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        measure=options.measure or ("profile" if on_cpu else "counters"),
    )


def _port(options: RunOptions, *, num_nodes: int) -> int:
    """One node: any free port. Several: they must agree, so that it is the given one or torch's default."""
    if options.master_port is None and num_nodes == 1:
        return free_port()
    port = DEFAULT_MASTER_PORT if options.master_port is None else options.master_port
    if options.node_rank == 0 and not is_free(port):
        raise LaunchError(f"port {port} is taken on this node; pass another --master-port, the same on every node")
    return port


def _fresh_directory(wish: str | None, candidate: Candidate) -> Path:
    """A directory that does not exist yet: the wished one, with a number if it is taken."""
    if wish is None:
        kind = candidate.scenario.strategy.kind
        base = RUNS_DIR / f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}"
    else:
        base = Path(wish)
    base = base.expanduser().resolve()
    for number in range(1, MAXIMUM_SAME_NAMES):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not path.exists():
            return path
    raise LaunchError(f"{base} exists in {MAXIMUM_SAME_NAMES} numbered copies; pass another --run-dir")


def _with_new_directory(prepared: PreparedRun, plan: Plan, options: RunOptions) -> PreparedRun:
    """Creates the run directory. Another run that took it in between makes this one prepare anew."""
    for _ in range(MAXIMUM_SAME_NAMES):
        try:
            prepared.run_dir.mkdir(parents=True)
        except FileExistsError:
            prepared = prepare_run(plan, options=options, candidate=prepared.candidate)
        except OSError as error:
            raise LaunchError(f"{prepared.run_dir} cannot be made ({error.strerror}); pass --run-dir DIR") from error
        else:
            return prepared
    raise LaunchError(f"{prepared.run_dir} is taken again and again; pass another --run-dir")


def _require_devices(plan: Plan, prepared: PreparedRun) -> None:
    if plan.cluster.gpu.backend is Backend.CPU:
        return
    from launchkit.probe.detect import detect  # lazy: processes on the CPU need no look at the machine

    num_processes = prepared.nodes.num_processes_per_node
    require_devices(plan.cluster, detect(), num_processes=num_processes, model=plan.model.name)


def _refuse_stale_locks(candidate: Candidate) -> None:
    """DeepSpeed builds extensions; a lock whose builder was killed makes it wait forever, without a word."""
    if not candidate.scenario.strategy.kind.zero_stage:
        return
    locks = stale_locks(os.environ)
    if locks:
        raise LaunchError(f"{locks[0]} was left by a killed build and the run would wait for it; rm {locks[0]}")


def _write_inputs(prepared: PreparedRun, plan: Plan, environment: Mapping[str, str]) -> None:
    command = prepared.command
    texts = {
        "plan.json": document_text(plan_document(plan)),
        COMMAND_FILE: command.text + "\n",
        PROCESS_FILE: _json(own_process()),
        "environment.json": _json(recorded_environment(command.environment, environment)),
        **{needed.name: needed.text for needed in command.files},
    }
    for name, text in texts.items():
        (prepared.run_dir / name).write_text(text, encoding="utf-8")


def _finish(prepared: PreparedRun, *, outcome: Outcome, failure: Failure | None, ranks: tuple[int, ...]) -> RunRecord:
    measured = tuple(found for rank in ranks if (found := _read_rank(prepared.run_dir, rank)) is not None)
    record = _record(
        prepared,
        exit_code=_exit_code(outcome, failure),
        seconds=outcome.seconds,
        measured=measured,
        failure=failure,
        stopped_by=signal_name(outcome.received) if outcome.received else "",
        notes=_notes(prepared, outcome, failure, measured),
    )
    (prepared.run_dir / RESULT_FILE).write_text(_json(record.document), encoding="utf-8")
    return record


def _exit_code(outcome: Outcome, failure: Failure | None) -> int:
    """A signal's, or that of the rank that failed first: torchrun returns 1 whatever its workers returned."""
    if outcome.received:
        return outcome.exit_code
    return 0 if failure is None else failure.exit_code or outcome.exit_code or 1


def _notes(
    prepared: PreparedRun, outcome: Outcome, failure: Failure | None, measured: tuple[RankRecord, ...]
) -> tuple[str, ...]:
    notes = [note for record in measured for note in record.notes]
    if prepared.is_built_in:
        notes += job_notes(prepared.candidate)
    if failure is None and outcome.returncode and not outcome.received:
        notes.append(f"every rank finished its work; the launcher then ended with {outcome.returncode} at teardown")
    if outcome.num_left:
        notes.append(f"{outcome.num_left} processes outlived the launcher and were ended")
    return tuple(dict.fromkeys(notes))


def _read_rank(run_dir: Path, rank: int) -> RankRecord | None:
    path = run_dir / f"rank{rank}.json"
    return rank_record(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _record(
    prepared: PreparedRun,
    *,
    exit_code: int,
    seconds: float,
    measured: tuple[RankRecord, ...] = (),
    failure: Failure | None = None,
    stopped_by: str = "",
    notes: tuple[str, ...] = (),
    dry_run: bool = False,
) -> RunRecord:
    strategy, nodes = prepared.candidate.scenario.strategy, prepared.nodes
    world_size = nodes.num_nodes * nodes.num_processes_per_node
    return RunRecord(
        run_dir=str(prepared.run_dir),
        command=prepared.command.argv,
        engine=prepared.command.engine,
        strategy=strategy.name,
        exit_code=exit_code,
        seconds=seconds,
        predicted=predicted_values(prepared.candidate),
        ranks=measured,
        strategy_is_live=strategy_is_live(strategy.kind, measured, world_size=world_size),
        failure="" if failure is None else failure.text,
        log="" if failure is None else failure.log,
        stopped_by=stopped_by,
        notes=notes,
        dry_run=dry_run,
    )


def _json(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=2) + "\n"
