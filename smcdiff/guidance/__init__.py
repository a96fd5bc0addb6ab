"""Twists: approximations of the likelihood p(y | x_t) of a noisy sample.

For a linear-Gaussian measurement y ~ N(A x_0, R) a twist is a Gaussian in the residual r = y - A x0_hat(x_t),

    psi_t(x) = N(y; A x0_hat, V_t),        grad log psi_t = (d x0_hat/dx)^T A^T V_t^{-1} r,

V_t being held fixed under the gradient. They differ in V_t:

- `dps`: V = R;
- `pigdm`: V = R + r_t^2 A A^T with r_t^2 = sigma^2/(alpha^2 + sigma^2), exact for standard normal data;
- `moment_matching`: V = R + A C A^T with C = Cov[x_0|x_t] = (sigma^2/alpha) d x0_hat/dx, exact for Gaussian data. A C
  is found by one vector-Jacobian product for each measured direction, exactly for few measurements, and in a
  Krylov subspace plus an isotropic rest for many.

`saddlepoint` goes beyond one Gaussian: it asks the denoiser at tilted noisy samples, and finds the mode of x_0 | x_t
that the measurement speaks for.

A twist is a callable ``twist(model, problem, x, t) -> TwistValue``; write your own, or wrap a function by
`log_twist`. Work is done in whitened units, A and r divided by the noise's deviation, so that R = I.

Sources: Chung et al., "Diffusion Posterior Sampling", arXiv 2209.14687 (dps); Song et al., "Pseudoinverse-Guided
Diffusion Models", ICLR 2023 (pigdm); Boys et al., "Tweedie Moment Projected Diffusions", arXiv 2310.06721, and Rozet
et al., "Learning Diffusion Priors from Observations by Expectation Maximization", arXiv 2405.13712 (moments).
"""

from smcdiff.guidance.default import default_twist
from smcdiff.guidance.fixed import dps, pigdm
from smcdiff.guidance.moments import moment_matching
from smcdiff.guidance.saddlepoint_twist import saddlepoint
from smcdiff.guidance.twist import Twist, TwistValue, log_twist

__all__ = [
    "Twist",
    "TwistValue",
    "default_twist",
    "dps",
    "log_twist",
    "moment_matching",
    "pigdm",
    "saddlepoint",
]
