"""Generates the CRDs, the chart's copy of them and the API reference from the models in attune.api."""
