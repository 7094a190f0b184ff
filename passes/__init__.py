"""Passes: rewrites of modules. A pass of your own needs only what is exported here and `stemma.ir`."""

from stemma.passes.base import Label, ModelInfo, Needs, Pass, PassContext, Stage
from stemma.passes.manager import PassRecord, PipelineResult, read_dump, run_pipeline
from stemma.passes.pattern import ANY, Match, any_of, leaf, maybe_cast, maybe_reshape, optional, scalar
from stemma.passes.properties import PROPERTIES, module_property
from stemma.passes.rewrite import NoMatch, Rule, RulePass, rewrite, rule
from stemma.passes.selftest import check_rule, example
from stemma.passes.why import PartialMatch, explain

__all__ = [
    "ANY", "PROPERTIES", "Label", "Match", "ModelInfo", "Needs", "NoMatch", "PartialMatch", "Pass", "PassContext", "PassRecord",
    "PipelineResult", "Rule", "RulePass", "Stage", "any_of", "check_rule", "example", "explain", "leaf", "maybe_cast",
    "maybe_reshape", "module_property", "optional", "read_dump", "rewrite", "rule", "run_pipeline", "scalar",
]  # fmt: skip
