"""Where a NIfTI header says that its voxels lie, kept so that label maps open over their images in every program.

A header may place its voxels twice, by a rotation (qform) and by a matrix (sform), and programs choose differently.
nibabel, and this package, take the sform if its code is above 0, then the qform. ITK 5.4, and with it SimpleITK,
ITK-SNAP and 3D Slicer, take the sform if its code is 1 and it has no shear, then the qform, then another sform, and the
size of voxels from `pixdim` in any case; they refuse a sheared sform that has no qform beside it. Only a header with
the same fields as the image's is read alike by all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

SPATIAL_UNITS = 7  # bits of xyzt_units; the others are the unit of time
MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # of the codes of metre, millimetre and micrometre; else millimetres
SCANNER = 1  # code of coordinates of the scanner
QFORM_FIELDS = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
SFORM_FIELDS = ("srow_x", "srow_y", "srow_z")


@dataclass(frozen=True, kw_only=True)
class NiftiGeometry:
    """The fields of a NIfTI header that place its voxels, as they are in the file; none of its texts.

    Attributes:
        version: of NIfTI, 1 or 2.
        pixdim: sign of the qform's third axis, and size of a voxel along the three axes, in `units`.
        qform_code: what the qform's coordinates are, 0 for no qform.
        qform: three components of its quaternion, and its offset.
        sform_code: what the sform's coordinates are, 0 for no sform.
        sform: the three rows of its matrix.
        units: code of the unit of length, 0 if the file names none.
    """

    version: int
    pixdim: tuple[float, ...]
    qform_code: int
    qform: tuple[float, ...]
    sform_code: int
    sform: tuple[tuple[float, ...], ...]
    units: int

    @classmethod
    def of_header(cls, header: nib.Nifti1Header) -> NiftiGeometry:
        """The geometry in a header, which may be one that was not checked."""
        return cls(
            version=2 if isinstance(header, nib.Nifti2Header) else 1,
            pixdim=tuple(header["pixdim"][:4].astype(float).tolist()),
            qform_code=int(header["qform_code"]),
            qform=tuple(float(header[name]) for name in QFORM_FIELDS),
            sform_code=int(header["sform_code"]),
            sform=tuple(tuple(header[name].astype(float).tolist()) for name in SFORM_FIELDS),
            units=int(header["xyzt_units"]) & SPATIAL_UNITS,
        )

    @classmethod
    def of_affine(cls, affine: np.ndarray) -> NiftiGeometry:
        """The geometry of an image that was no NIfTI file: qform and sform in scanner millimetres.

        Args:
            affine: (4, 4), voxel index to millimetres (RAS+). If it is sheared, as that of a tilted gantry is, the
                qform has its first two axes, and a third one of the same length at a right angle to both: so ITK reads
                a DICOM series.
        """
        header = nib.Nifti1Header()
        header.set_qform(_without_shear(affine), code=SCANNER)
        header.set_sform(affine, code=SCANNER)
        header.set_xyzt_units("mm")
        return cls.of_header(header)

    @property
    def qform_affine(self) -> np.ndarray | None:
        """(4, 4), voxel index to millimetres (RAS+) by the qform; None without one."""
        if self.qform_code <= 0:
            return None
        header = nib.Nifti1Header()
        self.write_into(header)
        try:
            with np.errstate(all="ignore"):
                affine = header.get_qform()
        except (ValueError, HeaderDataError):  # a quaternion longer than 1, or negative sizes
            return None
        affine[:3] *= MILLIMETRES.get(self.units, 1.0)
        return affine if np.isfinite(affine).all() else None

    def write_into(self, header: Any) -> None:
        """Set the fields of a header, a `nibabel.Nifti1Header` or `Nifti2Header`."""
        header["pixdim"][:4] = self.pixdim
        header["qform_code"], header["sform_code"] = self.qform_code, self.sform_code
        for name, number in zip(QFORM_FIELDS, self.qform, strict=True):
            header[name] = number
        for name, row in zip(SFORM_FIELDS, self.sform, strict=True):
            header[name] = row
        header["xyzt_units"] = self.units


def _without_shear(affine: np.ndarray) -> np.ndarray:
    """The (4, 4) affine with its second axis turned, if need be, and its third axis set upright on the first two."""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    first = affine[:3, 0] / sides[0]
    second = affine[:3, 1] - first * (first @ affine[:3, 1])
    second /= np.linalg.norm(second)
    third = np.cross(first, second)
    third *= np.sign(third @ affine[:3, 2])
    upright = affine.copy()
    upright[:3, :3] = np.stack([first, second, third], axis=1) * sides
    return upright
