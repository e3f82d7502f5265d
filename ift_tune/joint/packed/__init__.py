"""Several small runs on one device, advanced together: their tensors are stacked, steps vmapped."""

from ift_tune.joint.packed.eligibility import require_packable, require_packable_config
from ift_tune.joint.packed.member import Member
from ift_tune.joint.packed.pack import Pack
from ift_tune.joint.packed.proofs import PackMismatch

__all__ = ["Member", "Pack", "PackMismatch", "require_packable", "require_packable_config"]
