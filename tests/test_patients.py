"""The patients of public data sets are told by the names of their cases, or asked for."""

from __future__ import annotations

import pytest
from fedfactory.imaging.patients import doubts, patient_of

PUBLISHED = {
    "ADNI": {
        "002_S_0295": ["002_S_0295", "ADNI_002_S_0295_MR_MPR_S13408_I45112", "002_S_0295/scan2"],
        "002_S_0413": ["002_S_0413"],
        "011_S_0003": ["011_S_0003_bl"],
    },
    "M&Ms": {"A0S9V9": ["A0S9V9", "A0S9V9_sa", "A0S9V9_ES"], "A0S9V8": ["A0S9V8"], "A3H1O5": ["A3H1O5"]},
    "M&Ms-2": {"001": ["001_ED", "001_ES", "001_SA_ED"], "002": ["002_ED"]},
    "BraTS 2017 to 2019": {
        "CBICA_AAB": ["BraTS19_CBICA_AAB_1", "Brats18_CBICA_AAB_1", "Brats17_CBICA_AAB_1"],
        "CBICA_AAG": ["BraTS19_CBICA_AAG_1"],
        "TCIA01_201": ["BraTS19_TCIA01_201_1"],
        "2013_2": ["BraTS19_2013_2_1"],
    },
    "BraTS 2020 and later": {
        "BraTS20_Training_001": ["BraTS20_Training_001"],
        "BraTS20_Training_002": ["BraTS20_Training_002"],
        "BraTS2021_00000": ["BraTS2021_00000"],
        "BraTS-GLI-00000": ["BraTS-GLI-00000-000", "BraTS-GLI-00000-001"],
        "BraTS-MEN-RT-0001": ["BraTS-MEN-RT-0001-1"],
    },
    "ACDC": {"patient001": ["patient001_frame01", "patient001_frame12"], "patient002": ["patient002_frame01"]},
    "MM-WHS": {"ct_train_1001": ["ct_train_1001"], "mr_train_1001": ["mr_train_1001"]},
    "TotalSegmentator": {"s0011": ["s0011"], "s0012": ["s0012"]},
    "AMOS": {"amos_0001": ["amos_0001"], "amos_0004": ["amos_0004"]},
    "Kvasir-SEG": {
        "cju0qkwl35piu0993l0dewei2": ["cju0qkwl35piu0993l0dewei2"],
        "cju0qoxqj9q6s0835b43399p4": ["cju0qoxqj9q6s0835b43399p4"],
    },
    "ISIC": {"ISIC_0000013": ["ISIC_0000013"], "ISIC_0000014": ["ISIC_0000014"]},
    "BIDS": {"sub-01": ["sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-01"], "sub-02": ["sub-02_ses-1_T1w"]},
    "nnU-Net": {"la_003": ["la_003"], "la_004": ["la_004"], "hippocampus_001": ["hippocampus_001"]},
    "OASIS": {"OAS1_0001": ["OAS1_0001_MR1", "OAS1_0001_MR2"], "OAS1_0002": ["OAS1_0002_MR1"]},
    "TCIA": {"TCGA-02-0003": ["TCGA-02-0003"], "C3L-00001": ["C3L-00001"], "LUNG1-001": ["LUNG1-001"]},
    "LUNA16": {"1.3.6.1.4.1.14519.5.2.1.6279.6001.1": ["1.3.6.1.4.1.14519.5.2.1.6279.6001.1"]},
}


@pytest.mark.parametrize("data_set", PUBLISHED)
def test_names_as_published_tell_the_patient(data_set):
    for patient, names in PUBLISHED[data_set].items():
        assert {name: patient_of(name, None) for name in names} == dict.fromkeys(names, patient)


def guessed(*names: str) -> list[str]:
    return doubts({name: patient_of(name, None) for name in names})


def test_names_that_tell_no_patient_are_asked_about():
    (text,) = guessed("cju0qkwl35piu0993l0dewei2", "cju0qoxqj9q6s0835b43399p4")
    assert "the names of 2 cases" in text and "--patients" in text
    assert "tell no patient" in guessed("ISIC_0000013", "ISIC_0000014")[0]


def test_patients_that_may_be_there_twice_under_other_names_are_asked_about():
    (text,) = guessed("BraTS19_CBICA_AAB_1", "BraTS20_Training_001")
    assert "under other names" in text and "name_mapping.csv" in text
    assert guessed("BraTS19_CBICA_AAB_1", "Brats18_CBICA_AAG_1") == []


def test_many_cases_of_few_patients_are_called_in_question():
    (text,) = guessed(*(f"0{centre}_{number:03d}" for centre in (1, 2) for number in range(4)))
    assert "8 cases are only 2 patients" in text and "01_000 and 01_003 are both '01'" in text
    assert "--patient-pattern" in text and "--patients" in text
    assert guessed(*(f"patient{n:03d}_frame{k:02d}" for n in range(5) for k in (1, 12))) == []
