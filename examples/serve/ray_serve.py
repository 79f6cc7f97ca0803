"""nemodiff's HTTP server as replicas of a Ray Serve deployment.

pip install "nemodiff[serve]" "ray[serve]"; ENGINE=/path/to/engine serve run ray_serve:app
"""

import os
from pathlib import Path

from ray import serve
from starlette.types import ASGIApp

from nemodiff.serving.http.app import Limits, Reports, open_server
from nemodiff.serving.http.hosts import AllowedHosts


def build() -> ASGIApp:
    """The application of one replica; Ray's proxy stands before it, so any host is allowed."""
    limits = Limits(hosts=AllowedHosts("0.0.0.0", ["*"]))
    engine = Path(os.environ["ENGINE"])
    return open_server(
        engine, limits=limits, name=None, defaults={"mode": "linear_spec"}, threads=1, reports=Reports("json")
    ).app


@serve.deployment(
    ray_actor_options={"num_cpus": 1},  # or num_gpus
    max_ongoing_requests=64,
    health_check_period_s=10,
    autoscaling_config={"min_replicas": 2, "max_replicas": 16, "target_ongoing_requests": 8},
)
@serve.ingress(build)
class Replica:
    """One engine."""


app = Replica.bind()
