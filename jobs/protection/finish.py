"""The end of a run: count the commits, write the report, print the result, choose the exit code."""

from __future__ import annotations

from jobs.protection.prepare import Run
from jobs.protection.status_file import StatusFile
from jobs.shared import cli
from pipeline import layout
from pipeline.deltas.survival import finer_jpegs
from pipeline.errors import PromiseError
from pipeline.report.report_data import report_data
from pipeline.report.report_page import ReportData, write_report
from pipeline.storage.store import Store


def finish_run(run: Run, status: StatusFile) -> int:
    """Write the report and the last status; exit code 3 if more is in quarantine than --max-quarantine allows."""
    data = report_data(run.output)
    total = len(run.plan.shards)
    if data.num_shards != total:
        raise PromiseError(f"{data.num_shards} of {total} shards are committed: run the same command again")
    share = data.num_quarantined / max(data.num_protected + data.num_quarantined, 1)
    code = cli.QUARANTINED if share > run.settings.max_quarantine or data.lost else cli.DONE
    counts = {"shards": total, "protected": data.num_protected, "quarantined": data.num_quarantined}
    place = publish_report(run.output, data)
    status.write("done", exit_code=code, stage="done", counts=counts)
    print(f"protected    {data.num_protected:,} images in {total} shards")
    print(f"quarantined  {data.num_quarantined:,} samples")
    _print_files(data)
    _print_clusters(data)
    print(f"report       {place}")
    cli.print_losses(data.lost, f"{run.settings.output}/{layout.REPORT}")
    if share > run.settings.max_quarantine:
        cli.warn(
            f"{share:.1%} of the samples were quarantined, --max-quarantine allows "
            f"{run.settings.max_quarantine:.1%}; see {run.settings.output}/{layout.QUARANTINE}/"
        )
    return code


def _print_files(data: ReportData) -> None:
    """Size of the image files, what they keep of the deltas, and a warning where JPEGs were too coarse for that."""
    if data.input_image_bytes:
        left = f", {data.survival / data.num_reread:.1%} of the delta left" if data.num_reread else ""
        print(f"image files  {data.output_image_bytes / data.input_image_bytes:.2f} x the size of the originals{left}")
    if data.num_finer:
        cli.warn(finer_jpegs(data.num_finer))


def _print_clusters(data: ReportData) -> None:
    """Sizes, the spread of the k-means starts, and a warning where delta moved few images."""
    sizes = [row.images for row in data.clusters]
    spread = data.clustering.restart_inertias if data.clustering else ()
    starts = f", inertia of the starts {min(spread):.4g} to {max(spread):.4g}" if spread else ""
    of_images = f" of {min(sizes):,} to {max(sizes):,} images" if sizes else ", without images"
    print(f"clusters     {len(sizes)}{of_images}{starts}")
    if low := [str(row.index) for row in data.clusters if row.is_low]:
        many = f"in {len(low)} of {len(data.clusters)} clusters, few images moved towards their target centroid"
        cli.warn(f"the protection is weak: {many}; see the report, and measure it with evaluate_relearning.py")


def publish_report(output: Store, data: ReportData) -> str:
    """Write the report of a run into its output; returns where it is."""
    output.put(layout.REPORT, write_report(data).encode())
    return f"{output.url}/{layout.REPORT}"
