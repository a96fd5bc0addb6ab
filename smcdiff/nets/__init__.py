"""Small networks, fast on a CPU, and the loop that trains them.

    net = UNet(rng_key, event_shape=(28, 28), channels=(32, 64), blocks=(2, 2), patch=2)
    model = Diffusion(net, apply_network, schedules.vp(), "edm", (28, 28), sigma_data=rms)
    model, history = train(rng_key, model, images, num_steps=9000)

A network is its own set of weights (all its leaves are arrays), takes ONE sample and one number, and returns an array
like the sample; see `smcdiff.nets.unet` for images and `smcdiff.nets.mlp` for vectors.
"""

from smcdiff.nets.flow import ConditionalFlow
from smcdiff.nets.layers import apply_network
from smcdiff.nets.mlp import MLP
from smcdiff.nets.training import NoiseLevels, denoising_loss, train
from smcdiff.nets.unet import UNet

__all__ = ["MLP", "ConditionalFlow", "NoiseLevels", "UNet", "apply_network", "denoising_loss", "train"]
