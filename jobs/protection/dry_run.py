"""--dry-run: the plan of a run with its time and cost, estimated from a few images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jobs.protection.prepare import Run, is_left
from pipeline import layout
from pipeline.deltas.apply import check_writable
from pipeline.deltas.load import load_protection
from pipeline.measures.cpus import available_cpus
from pipeline.measures.estimate import Estimate, bytes_per_sample, estimate, first_usable
from pipeline.records import Sample
from pipeline.report.page import duration
from pipeline.report.page import size as as_bytes
from pipeline.settings import Generator

# deltas of single images are made in two ways, of which one is faster for small and one for large collections
OTHER_WAY: Mapping[str, tuple[Generator, str]] = {"distilled": ("sample", "worse"), "sample": ("distilled", "better")}
WORTH_A_HINT = 0.8  # share of the time


def print_plan(run: Run) -> None:
    """Process a few images on this machine and print what the whole run would take, or what is left of it."""
    settings = run.settings
    if nothing_left(run):
        return
    samples, bytes_each, total = looked_at(run)
    predicted = estimate(samples, bytes_each, total, run.surrogate, settings, run.given)
    if run.given is None and not settings.overwrite and (kept := run.output.read_if_there(layout.PROTECTION)):
        clusters = len(load_protection(kept).clustering.centroids)
        predicted = replace(predicted, embed=0.0, fit=0.0, fit_bytes=0, clusters=clusters)
        print("fitted       by an earlier start: only applying is left")
    workers = settings.workers or available_cpus()
    height, width = predicted.sides
    images = f"about {predicted.images:,}, median {width}x{height} pixels (measured on {len(samples)} of them)"
    print(f"images       {images}")
    print(f"clusters     {predicted.clusters}, surrogate {settings.surrogate} at {run.surrogate.input_size} px")
    how = f"{settings.generator} through the {settings.optimise_through}"
    how = f"{run.given.generator}, from the given protection" if run.given else how
    print(f"delta        {how}, epsilon {settings.epsilon * 255:g}/255")
    if settings.epochs and not run.given:
        fitted = min(predicted.images, settings.fit_images or predicted.images)
        steps = settings.for_images(fitted).steps
        print(f"fit          about {steps:,} steps: {settings.epochs} epochs of {fitted:,} images")
    print_files(predicted, run)
    if predicted.fit_bytes:
        print(f"memory       {as_bytes(predicted.fit_bytes)} of images in each process that fits, and once for all")
    print_time(predicted, workers, run)
    if settings.generator in OTHER_WAY and run.given is None and predicted.fit:
        name, strength = OTHER_WAY[settings.generator]
        other = replace(settings, generator=name, steps=0, given=settings.given - {"steps"})
        saved = estimate(samples, bytes_each, total, run.surrogate, other)
        print_hint(predicted, saved, workers, f"--generator {name} protects a little {strength}")


def nothing_left(run: Run) -> bool:
    """True, and printed, if an earlier start has committed and measured every shard."""
    if done := not is_left(run):
        print("time         nothing is left to do but to write the report again")
    return done


def looked_at(run: Run) -> tuple[list[Sample], float, int]:
    """A few usable samples of what is left to do, or of all if only measuring is; bytes per sample, and of all."""
    settings, left = run.settings, run.plan.left or run.plan.shards
    samples = first_usable(
        run.source,
        left,
        max_member_bytes=settings.max_member_bytes,
        use=lambda sample: check_writable(sample, settings),
    )
    each = bytes_per_sample(run.source, left, max_member_bytes=settings.max_member_bytes)
    return samples, each, sum(shard.size for shard in left)


def print_hint(mine: Estimate, other: Estimate, workers: int, what: str) -> None:
    """Say so if another generator would take clearly less time; `what` says which, and how good it is."""
    before, after = (sum(one.stage_seconds(workers).values()) for one in (mine, other))
    if after < WORTH_A_HINT * before:
        print(f"hint         {what}, and would take about {duration(after)}")


def print_files(predicted: Estimate, run: Run) -> None:
    """What becomes of the image files, and of the deltas in them."""
    factor, encode = predicted.output_factor, run.settings.encode
    print(f"output       {factor:.2f} x the size of the image files (--encode {encode})")
    finer = f"; {predicted.num_finer} of these need a finer coding than their own" if predicted.num_finer else ""
    print(f"survival     {predicted.survival:.1%} of the delta left in the files, on the images measured{finer}")


def print_time(predicted: Estimate, workers: int, run: Run) -> None:
    """Time of each stage and of all, and what they cost if a price is given."""
    stages = predicted.stage_seconds(workers)
    for stage, seconds in stages.items():
        print(f"  {stage:<10} {duration(seconds)}")
    total = sum(stages.values())
    if run.settings.gpus_per_worker:
        print(
            f"time         at most {duration(total)} with {workers} workers, as measured on a CPU; GPUs take far less"
        )
    else:
        print(f"time         about {duration(total)} with {workers} workers as fast as this machine's")
    prices = (run.settings.price_per_gpu_hour, run.settings.price_per_cpu_hour)
    if prices != (None, None):
        hours = predicted.hours(workers, run.settings)
        cost = sum(hour * (price or 0.0) for hour, price in zip(hours, prices, strict=True))
        bound = "at most" if run.settings.gpus_per_worker else "about"
        print(
            f"cost         {bound} {cost:,.2f} for {hours[0]:,.2f} GPU-hours and {hours[1]:,.2f} CPU-hours, "
            f"{cost / max(predicted.images, 1) * 1e6:,.2f} per million images"
        )
