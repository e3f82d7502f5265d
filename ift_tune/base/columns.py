"""Names of columns that several rooms write and read; `trial.tables` has those of all tables."""

HEALTH_COLUMNS = (
    "solve_status",
    "relative_residual",
    "alpha_lambda_max",
    "negative_curvature",
    "hypergradient_norm",
    "skipped",
    "val_test_gap",
)
"""What each outer step says of its linear solve.

solve_status: a `SolveStatus` value.
relative_residual: ‖v − H·q‖/‖v‖ (Neumann: an upper bound). Small is exact; near 1 the series has
    barely begun; above 1 it diverges.
alpha_lambda_max: α·λ_max, estimated from below (Neumann only). The series diverges above 2.
negative_curvature: 1 where a direction of negative curvature was met, else 0.
hypergradient_norm: ‖dL_V/dλ‖.
skipped: 1 where the hypergradient was unusable and λ stayed as it was, else 0.
val_test_gap: test minus validation error (loss where there is no error): how far λ overfits.
"""

FOUND_PREFIXES = ("retrained_", "learned_")
"""How the names of what is measured once, at a trial's end, begin."""

COARSE_PREFIX = "knob."
"""How the columns of coarse parameters begin: they were called knobs, and tables keep their names.
"""
