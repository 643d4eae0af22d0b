//! NVIDIA devices, through the driver that is loaded at run time: the program starts, and says what is missing, where there is
//! none.

mod driver;

use std::fmt;

pub use driver::cuda_devices;

/// One device, as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// As in "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Its memory, bytes.
    pub memory: u64,
    /// Compute capability: 9.0 is a Hopper.
    pub capability: (u32, u32),
}

impl fmt::Display for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, memory, capability: (major, minor) } = self;
        let memory = *memory as f64 / f64::from(1 << 30);
        write!(f, "{name} ({memory:.0} GiB, compute capability {major}.{minor})")
    }
}

/// There is no device to compute on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// No library to ask.
    #[error("libcuda.so.1, the library of the NVIDIA driver, is not there")]
    NoDriver,
    /// A driver without devices: none in the machine, or none given to the container.
    #[error("the NVIDIA driver has no device for this process")]
    NoDevice,
    /// The driver's own answer.
    #[error("{call} failed: {answer}")]
    Driver {
        /// Function of the driver's API.
        call: &'static str,
        /// Name of its error.
        answer: String,
    },
}
