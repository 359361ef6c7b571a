//! NVIDIA GPUs through NVML, which is loaded at run time: a machine without it simply has none.
//!
//! Only reads. A GPU that fails to answer is left out of the capacity; in the load it stands with zeros, so that the order stays.

use everlit_api::status::{GpuInfo, GpuLoad};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;

/// The node's GPUs.
pub(super) struct Gpus {
    nvml: Option<Nvml>,
    infos: Vec<GpuInfo>,
}

impl Gpus {
    /// Asks the driver.
    pub(super) fn find() -> Self {
        let nvml = match Nvml::init() {
            Ok(nvml) => nvml,
            Err(error) => {
                tracing::debug!(%error, "no GPUs: NVML is not there");
                return Self::none();
            }
        };
        let count = nvml.device_count().unwrap_or(0);
        let infos =
            (0..count).filter_map(|index| info(&nvml, index).inspect_err(|error| tracing::warn!(index, %error, "a GPU is left out")).ok());
        Self { infos: infos.collect(), nvml: Some(nvml) }
    }

    /// A node without GPUs.
    pub(super) fn none() -> Self {
        Self { nvml: None, infos: Vec::new() }
    }

    /// What there is.
    pub(super) fn infos(&self) -> Vec<GpuInfo> {
        self.infos.clone()
    }

    /// What they do.
    pub(super) fn loads(&self) -> Vec<GpuLoad> {
        let load = |info: &GpuInfo| self.nvml.as_ref().and_then(|nvml| load(nvml, info.index)).unwrap_or_default();
        self.infos.iter().map(load).collect()
    }
}

fn info(nvml: &Nvml, index: u32) -> Result<GpuInfo, nvml_wrapper::error::NvmlError> {
    let device = nvml.device_by_index(index)?;
    Ok(GpuInfo { index, name: device.name()?, uuid: device.uuid()?, memory: device.memory_info()?.total })
}

fn load(nvml: &Nvml, index: u32) -> Option<GpuLoad> {
    let device = nvml.device_by_index(index).ok()?;
    Some(GpuLoad {
        utilization: device.utilization_rates().map_or(0.0, |rates| f64::from(rates.gpu) / 100.0),
        memory: device.memory_info().map_or(0, |memory| memory.used),
        temperature: device.temperature(TemperatureSensor::Gpu).ok(),
    })
}
