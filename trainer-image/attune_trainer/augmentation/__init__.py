"""Augmentation: training audio that sounds different in each epoch, as speakers, rooms and lines do.

Written here and not taken from audiomentations: each of its transforms draws from global random state, so that a run
that goes on from a checkpoint could not hear what an uninterrupted one hears.
"""
