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
        let infos = (0..count)
            .filter(|index| is_ours(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(), *index))
            .filter_map(|index| info(&nvml, index).inspect_err(|error| tracing::warn!(index, %error, "a GPU is left out")).ok());
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

/// An agent that was itself given only some GPUs (by index) has only those.
fn is_ours(visible: Option<&str>, index: u32) -> bool {
    let Some(visible) = visible else { return true };
    let indexes: Result<Vec<u32>, _> = visible.split(',').map(|one| one.trim().parse()).collect();
    // A list of device names is not understood here: all are taken.
    indexes.map_or(!visible.trim().is_empty(), |indexes| indexes.contains(&index))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_own_list_of_gpus_holds() {
        assert!(is_ours(None, 3));
        assert!(is_ours(Some("1, 3"), 3) && !is_ours(Some("1,3"), 2) && !is_ours(Some(""), 0));
        assert!(is_ours(Some("GPU-8f2c"), 0));
    }
}
