"""Bayesian logistic regression on the breast cancer data: nearly separable classes, correlated features.

    b ~ N(0, 2.5^2),    w ~ N(0, I),    P(y_i = 1) = 1 / (1 + exp(-b - w.f_i)).

A sample is (b, w), 31 numbers. The 569 rows are put in an order drawn once; the first 455 are the data and the other
114 are held out. Features are standardised by mean and deviation of the data. All constants of the prior are in the
density, so that Z is the marginal likelihood.

There is no closed form: moments and evidence are measurements with standard errors, stored with the package. The
moments are means over long NUTS runs. The evidence is an importance estimate with a Student law fitted to these, which
knows the moments as well: see ``python -m benchmarks reference_moments``, which makes the file.

Sources: the data of Wolberg, Street and Mangasarian, "Breast Cancer Wisconsin (Diagnostic)" (1993), as they come with
scikit-learn; priors as in Grenioux et al., "Stochastic Localization via Iterative Posterior Sampling", arXiv
2402.10758.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smcdiff.targets.target import Moments, Target, parameter

__all__ = ["REFERENCE", "LogisticRegressionTarget", "logistic_regression"]

REFERENCE = Path(__file__).with_name("logistic_regression.json")
_INTERCEPT_STD = 2.5
_NUM_DATA = 455


class LogisticRegressionTarget(Target):
    """The posterior of a logistic regression; build it with `logistic_regression`.

    Attributes
    ----------
    features
        Shape (n, 31), the first column ones.
    signs
        Labels of the data, -1 or 1, shape (n,).
    held_out_features
        The same for the rows held out.
    held_out_signs
        Their labels.
    log_evidence_std_error
        Standard error of ``log_evidence``.
    """

    features: Float[Array, "n d"]
    signs: Float[Array, " n"]
    held_out_features: Float[Array, "m d"]
    held_out_signs: Float[Array, " m"]
    log_evidence_std_error: float

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.features.shape[1:]

    def logdensity(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log of prior times likelihood at one sample ``x``."""
        log_likelihood = jnp.sum(jax.nn.log_sigmoid(self.signs * (self.features @ x)))
        constant = 0.5 * len(x) * math.log(2 * math.pi) + math.log(_INTERCEPT_STD)
        return log_likelihood - 0.5 * (x[0] / _INTERCEPT_STD) ** 2 - 0.5 * jnp.sum(x[1:] ** 2) - constant

    def held_out_log_likelihood(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log likelihood of the 114 rows held out, at one sample ``x``."""
        return jnp.sum(jax.nn.log_sigmoid(self.held_out_signs * (self.held_out_features @ x)))


def logistic_regression() -> LogisticRegressionTarget:
    """Bayesian logistic regression on the breast cancer data, with reference moments and evidence.

    Raises
    ------
    ImportError
        If scikit-learn, which brings the data, is not installed.
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise ImportError(
            "logistic_regression needs the breast cancer data of scikit-learn: pip install scikit-learn."
        ) from error
    values, labels = load_breast_cancer(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    data, held_out = order[:_NUM_DATA], order[_NUM_DATA:]
    values = (values - values[data].mean(axis=0)) / values[data].std(axis=0)
    features = np.concatenate([np.ones((len(labels), 1)), values], axis=1)
    signs = 2.0 * labels - 1.0
    reference = json.loads(REFERENCE.read_text())
    return LogisticRegressionTarget(
        reference["log_evidence"],
        Moments(*(np.array(reference[name], float) for name in Moments._fields)),
        parameter(features[data]),
        parameter(signs[data]),
        parameter(features[held_out]),
        parameter(signs[held_out]),
        reference["log_evidence_std_error"],
    )
