"""What a data set decides of a plan: how long its sequences are, and how long one pass over it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launchkit.lengths import Lengths
from launchkit.model import ModelProfile
from launchkit.plan import Candidate, DataUse
from launchkit.planner.evaluate import Bench, step_time
from launchkit.request import Request, split_of
from launchkit.scenario import Fp8Backend, Scenario, Split
from launchkit.units import divide_up, round_up

# Measured over predicted time of a step, by family of published runs on A100 and RTX 4090 (bench/throughput.py): nine
# of its ten medians lie between. The tenth, of V100 runs of 2021, is 2.2.
FASTER, SLOWER = 0.92, 1.27
MOST_LONG_SHARE = 0.01  # of the examples: what can be cut off for a much shorter plan
MUCH_SHORTER = 0.75
SHORTEST = 2  # tokens: one to predict the other from
TRANSFORMER_ENGINE_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A request whose length is the data's where it left that open, and what is to be said of it."""

    request: Request
    notes: tuple[str, ...] = ()


def fit_to_data(request: Request, lengths: Lengths | None, *, model: ModelProfile) -> Fitted:
    """Plans for the longest example, as far as the model was made for it. A length that was asked for stays, and so
    does the usual one of packed sequences, which examples fill end to end."""
    if lengths is None:
        return Fitted(request=request)
    most = model.max_position_embeddings
    if request.seq_len is not None or request.packing:
        return Fitted(request=request, notes=_estimated_notes(lengths))
    seq_len = min(lengths.longest, most) if most else lengths.longest
    fitted = replace(request, seq_len=round_up(max(seq_len, SHORTEST), _pieces(split_of(request), request.fp8_backend)))
    return Fitted(request=fitted, notes=(*_length_notes(lengths, seq_len, most=most), *_estimated_notes(lengths)))


def _length_notes(lengths: Lengths, seq_len: int, *, most: int) -> tuple[str, ...]:
    notes = []
    if cut := lengths.num_longer(seq_len):
        notes.append(f"{_examples(cut)} cut at {seq_len:,} tokens, the most that the model was made for")
    common = lengths.quantile(1 - MOST_LONG_SHARE)
    if common < MUCH_SHORTER * min(lengths.longest, seq_len):
        notes.append(
            f"{_examples(lengths.num_longer(common))} longer than {common:,} tokens: --seq-len {common} cuts them, "
            "and takes less memory"
        )
    return tuple(notes)


def _examples(number: int) -> str:
    return "1 example is" if number == 1 else f"{number:,} examples are"


def _estimated_notes(lengths: Lengths) -> tuple[str, ...]:
    if not lengths.is_estimated:
        return ()
    return (f"the model's tokenizer is not at hand: lengths are {lengths.counted_by}; --seq-len sets your own",)


def with_data(bench: Bench, candidate: Candidate, lengths: Lengths | None) -> Candidate:
    """The candidate with what one pass over the data is to it; without data as it is."""
    return candidate if lengths is None else replace(candidate, data=use_of(bench, candidate.scenario, lengths))


def use_of(bench: Bench, scenario: Scenario, lengths: Lengths) -> DataUse:
    """One pass over the data by the clock, its batches as wide as they usually are."""
    batch, training = scenario.batch, scenario.training
    num_ranks = scenario.strategy.num_data_ranks(bench.cluster.num_gpus)
    num_rows = lengths.num_rows(seq_len=batch.seq_len, packing=training.packing)
    num_steps = divide_up(num_rows, batch.global_batch(num_ranks))
    seconds = num_steps * _usual_step_seconds(bench, scenario, lengths, num_sequences=batch.micro_batch * num_ranks)
    return DataUse(
        path=lengths.path,
        num_examples=lengths.num_examples,
        num_rows=num_rows,
        mean_tokens=round(lengths.mean, 1),
        longest_tokens=lengths.longest,
        num_truncated=0 if training.packing else lengths.num_longer(batch.seq_len),
        counted_by=lengths.counted_by,
        num_steps=num_steps,
        seconds=seconds,
        seconds_low=FASTER * seconds,
        seconds_high=SLOWER * seconds,
    )


def _usual_step_seconds(bench: Bench, scenario: Scenario, lengths: Lengths, *, num_sequences: int) -> float:
    """A step whose batches are padded to the longest of the sequences that run side by side, since ranks wait for each
    other. Where that length has no program at hand, the planned step by its share of the tokens."""
    batch = scenario.batch
    if scenario.training.packing:
        return step_time(bench, scenario).seconds
    pieces = _pieces(scenario.strategy.split, scenario.training.fp8_backend)
    width = min(round_up(lengths.padded_tokens(num_sequences, seq_len=batch.seq_len), pieces), batch.seq_len)
    usual = replace(scenario, batch=replace(batch, seq_len=width))
    if bench.source.has_program(bench.key(usual)):
        return step_time(bench, usual).seconds
    return step_time(bench, scenario).seconds * width / batch.seq_len


def _pieces(split: Split, fp8_backend: Fp8Backend | None) -> int:
    """What lengths are made a multiple of: the pieces that ranks share, the rows of Transformer Engine's products."""
    return split.num_pieces * (TRANSFORMER_ENGINE_ROWS if fp8_backend is Fp8Backend.TE else 1)
