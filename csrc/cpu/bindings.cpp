// The Python module hvpfast.kernels._cpu: arguments are addresses and integers, checked by the launchers in native.py.
#include <pybind11/pybind11.h>

#include "tiers.hpp"

namespace py = pybind11;
using namespace hvpfast;

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "hvpfast's CPU kernels";
    m.def("tiers", [] {
        py::dict reasons;
        for (Tier tier : {Tier::portable, Tier::avx2, Tier::avx512, Tier::amx}) {
            const std::string reason = tier_missing(tier);
            reasons[tier_name(tier)] = reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
        }
        return reasons;
    }, "Each tier's name, with None where it can run here, else the reason why not.");
    m.def("tier", [] { return tier_name(tier_in_use()); }, "The tier in use.");
    m.def("force_tier", [](py::object name) {
        if (name.is_none()) release_tier();
        else force_tier(tier_from_name(py::cast<std::string>(name)));
    }, py::arg("name"), "Use one tier from now on; None gives the choice back.");
    tier_in_use();  // a tier forced by HVPFAST_CPU that cannot run fails the import, saying why
}
