"""Trained models for other runtimes: a SavedModel that TensorFlow Serving takes as it is."""
