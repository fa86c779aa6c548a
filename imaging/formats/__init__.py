"""Volumes as files hold them: NIfTI, NRRD and MetaImage, their frames, and their label values."""
