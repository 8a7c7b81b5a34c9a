"""The last step of an audit: a certificate for each protection whose battery, fits and trainings are complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from actors.trials import look_at
from jobs.evaluation.steps import Loaded
from pipeline.errors import InputError
from pipeline.relearning.evaluation import EvaluationSettings
from pipeline.relearning.report.certificate import (
    BATTERIES,
    CERTIFICATE,
    PAGE,
    Certificate,
    Certificates,
    certify,
    fit_at,
    lacking,
    visibility_of,
)
from pipeline.relearning.report.results import Row
from pipeline.report.page import plain_url
from pipeline.storage.store import Store

_PRIVATE = {"debug", "dry_run", "clean", "test", "protected", "output", "workers"}  # or it stands elsewhere


def certify_all(settings: EvaluationSettings, rows: Sequence[Row], loaded: Loaded) -> None:
    """If a whole battery was run: write certificates and their page, or print what each protection lacks."""
    if not any(set(battery) <= set(settings.regimes) for battery in BATTERIES.values()):
        return
    drawn_up = [_certified(settings, name, rows, loaded) for name in settings.protected]
    complete = tuple(certificate for certificate in drawn_up if certificate is not None)
    loaded.output.delete([CERTIFICATE, PAGE])  # an earlier evaluation's would certify what no longer stands beside it
    if not complete:
        return
    certificates = Certificates(complete)
    loaded.output.put(CERTIFICATE, certificates.to_bytes())
    loaded.output.put(PAGE, certificates.page().encode())
    print(f"certificate  {loaded.output.url}/{PAGE}; for verify.py: {loaded.output.url}/{CERTIFICATE}")


def _certified(settings: EvaluationSettings, name: str, rows: Sequence[Row], loaded: Loaded) -> Certificate | None:
    urls, labelling = settings.protected[name], settings.labellings[0]
    missing = lacking(rows, name, len(urls), labelling)
    if missing:
        print(f"certificate  none for {name}: {missing}")
        return None
    try:
        fits = [fit_at(Store(url), plain_url(url)) for url in urls]
        if len({fit.collection_sha256 for fit in fits}) < len(fits):
            print(f"certificate  none for {name}: of its {len(fits)} fits two are the same, byte for byte")
            return None
    except InputError as error:
        print(f"certificate  none for {name}: {error}")
        return None
    arms = [arm for arm, url in settings.arms.items() if url in urls]
    looks = [look_at(loaded.arms[arm], loaded.clean) for arm in arms]
    chosen = {key: value for key, value in asdict(settings).items() if key not in _PRIVATE}
    return certify(
        rows,
        name,
        epsilon=max(epsilon for epsilon, _ in looks),
        visibility=visibility_of([score for _, scores in looks for score in scores]),
        fits=fits,
        settings=json.loads(json.dumps(chosen, default=str)),
        labelling=labelling,
    )
