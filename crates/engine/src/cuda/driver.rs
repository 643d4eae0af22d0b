//! The driver's C functions.
#![allow(unsafe_code, reason = "the driver is a C library")]

use cudarc::driver::{DriverError, result, sys};

use super::{CudaDevice, CudaError};

/// Every device this process may use, in the driver's order. Never an empty list.
pub fn cuda_devices() -> Result<Vec<CudaDevice>, CudaError> {
    // SAFETY: it only looks for the library, and loads it as any program that is linked with it would.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    result::init().map_err(failed("cuInit"))?;
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    if count < 1 {
        return Err(CudaError::NoDevice);
    }
    (0..count).map(device).collect()
}

fn device(ordinal: i32) -> Result<CudaDevice, CudaError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let device = result::device::get(ordinal).map_err(failed("cuDeviceGet"))?;
    let name = result::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
    // SAFETY: `device` came from this driver, after its init.
    let memory = unsafe { result::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))?;
    let attribute = |attribute| {
        // SAFETY: as above.
        let value = unsafe { result::device::get_attribute(device, attribute) };
        value.map(i32::unsigned_abs).map_err(failed("cuDeviceGetAttribute"))
    };
    Ok(CudaDevice { name, memory: memory as u64, capability: (attribute(MAJOR)?, attribute(MINOR)?) })
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |DriverError(code)| match code {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => CudaError::NoDevice,
        code => CudaError::Driver { call, answer: format!("{code:?}") },
    }
}
