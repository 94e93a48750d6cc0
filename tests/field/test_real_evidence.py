"""What docs/real_networks.md says of a hippocampus: which maps lead to what its mask depends on."""

from __future__ import annotations

import pytest
from test_real_networks import REAL, mesh_net, the_head

from seg3dcam import GradCAM, HiResCAM
from seg3dcam.cams.calls import each_by
from seg3dcam.evaluate import Rerun, mass_inside
from seg3dcam.evaluate.blocks import Blocks, Deletion, Subject
from seg3dcam.evaluate.controls import nearness
from seg3dcam.evaluate.segments import grown
from seg3dcam.targets import ClassLogOdds

HIPPOCAMPUS, MIDDLE = 14, "blocks.4"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real networks are not here")


@pytest.mark.slow
def test_no_cam_of_a_hippocampus_leads_to_what_it_depends_on():
    """That is what lies near: deleted first, it takes the mask along; by a CAM it takes longer."""
    network, target = mesh_net("model18cls"), ClassLogOdds(HIPPOCAMPUS)
    middle = (104, 148, 113)  # of the hippocampus of the patient's right side
    x = the_head("model18cls")[(..., *(slice(at - 40, at + 40) for at in middle))].clone()
    subject = Subject(Rerun(network, x), HIPPOCAMPUS, "softmax")
    assert 3000 < int(subject.mask.sum()) < 4500
    cams = [cam(network, MIDDLE) for cam in (HiResCAM, GradCAM)]
    ((sharp, pooled),) = [[one.maps[MIDDLE][0] for one in of] for of in each_by(cams, x, [target])]

    def inside(values):
        return mass_inside(values, {"mask": subject.mask})["mask"]

    assert inside(sharp) < 0.3
    assert inside(pooled) < 0.1

    blocks = Blocks.of(subject, 4, kept=grown(subject.mask.numpy(), 2))

    def dice(values, step):
        return Deletion(blocks, values, 16, "blur", 0).dice(step)

    assert dice(pooled, 16) < 0.05  # with all around it deleted there is no hippocampus
    near, of_sharp, of_pooled = (
        dice(values, 4) for values in (nearness(subject.mask), sharp, pooled)
    )
    assert near + 0.2 < of_sharp
    assert of_sharp + 0.1 < of_pooled
