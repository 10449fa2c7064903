"""What a model needs on devices that are not there: the real steps, compiled for the real mesh, and read."""

from dsv4_jax.plan.report import Plan, plan, sweep
from dsv4_jax.plan.topology import Topology, parse_topology

__all__ = ["Plan", "Topology", "parse_topology", "plan", "sweep"]
