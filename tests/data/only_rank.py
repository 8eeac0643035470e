"""The rows of a plan when one rank takes them all."""

from phi3v_dist.data.plan import Plan, RankRows


def only_rank(plan: Plan, epochs: int = 1) -> RankRows:
    """The rows of `epochs` epochs, in the order of the plan."""
    return RankRows(
        plan,
        dp_rank=0,
        dp_size=1,
        vision_chunk=16,
        first_row=0,
        steps=plan.steps_of(epochs),
        end_row=plan.end_row(epochs),
    )
