// The CUDA driver, opened at run time: no CUDA header or library is needed to build, no GPU to import.
#pragma once

#include <string>

#include "plan.h"

namespace qvl::cuda {

// The folder of the images <stem>.sm_61.cubin and <stem>.compute_61.ptx: cuda_images beside this library unless set.
void set_image_folder(std::string folder);

// Empty where kernels can be launched, else one sentence that says why not.
std::string driver_status();

// Executes the plan on a stream of the device, in its primary context (torch's). Asynchronous. Loads the image on first
// use: the cubin on compute capability 6.1, else the PTX, which the driver compiles. Throws std::runtime_error.
void launch(const Plan& plan, int device, void* stream);

}  // namespace qvl::cuda
