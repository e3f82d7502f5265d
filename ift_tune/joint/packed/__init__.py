"""Several small runs on one device, advanced together: their tensors are stacked, steps vmapped."""

from ift_tune.joint.packed.eligibility import require_packable, require_packable_config
from ift_tune.joint.packed.member import Member, PackMismatch
from ift_tune.joint.packed.pack import Pack

__all__ = ["Member", "Pack", "PackMismatch", "require_packable", "require_packable_config"]
