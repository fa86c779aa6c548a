"""Volumes as files hold them: NIfTI, NRRD and MetaImage, their frames, their label values, and what slices may be."""
