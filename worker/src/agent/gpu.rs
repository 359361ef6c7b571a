//! NVIDIA GPUs through NVML, which is loaded at run time: a machine without it simply has none.
//!
//! Only reads. A GPU that fails to answer is left out of the capacity; in the load it stands with zeros, so that the order stays. Errors of GPUs
//! come from a call that blocks, so a thread of its own waits for them. Those of a time in which no agent ran are not told by the driver again.

use std::sync::Arc;

use everlit_api::gpu::GpuError;
use everlit_api::status::{GpuInfo, GpuLoad};
use everlit_api::time::Timestamp;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::event::EventSet;
use nvml_wrapper::struct_wrappers::event::EventData;
use nvml_wrapper::{Device, Nvml};
use tokio::sync::mpsc;

use super::limits::GPU_WAIT_MS;
use super::place::FakeGpus;

/// What the driver reports of a GPU that fell off the bus.
const FELL_OFF_XID: u32 = 79;
/// NVML's number for an error that it has no number for.
const UNKNOWN_XID: u32 = 999;

/// The node's GPUs.
pub(super) struct Gpus {
    nvml: Option<Arc<Nvml>>,
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
        Self { infos: infos.collect(), nvml: Some(Arc::new(nvml)) }
    }

    /// A node without GPUs.
    pub(super) fn none() -> Self {
        Self { nvml: None, infos: Vec::new() }
    }

    /// GPUs that are not there, for tests and demos of placement: nothing can be computed on them.
    pub(super) fn fake(asked: FakeGpus) -> Self {
        tracing::warn!(count = asked.count, memory = asked.memory, "these GPUs are FAKE (--fake-gpus): programs find none");
        let info = |index| GpuInfo { index, name: "fake".into(), uuid: format!("FAKE-{index}"), memory: asked.memory };
        Self { nvml: None, infos: (0..asked.count).map(info).collect() }
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

    /// Processes that hold memory of a GPU for computing.
    pub(super) fn holders(&self, index: u32) -> Vec<u32> {
        let Some(device) = self.nvml.as_ref().and_then(|nvml| nvml.device_by_index(index).ok()) else { return Vec::new() };
        let processes =
            device.running_compute_processes().inspect_err(|error| tracing::warn!(index, %error, "who uses a GPU is not known"));
        processes.unwrap_or_default().into_iter().map(|process| process.pid).collect()
    }

    /// Has errors of the GPUs told from now on, for the life of this process.
    pub(super) fn watch(&self, errors: mpsc::Sender<GpuError>) {
        let Some(nvml) = self.nvml.clone().filter(|_| !self.infos.is_empty()) else { return };
        let infos = self.infos.clone();
        let begun =
            std::thread::Builder::new().name("gpu-errors".into()).stack_size(256 * 1024).spawn(move || watch(&nvml, &infos, &errors));
        if let Err(error) = begun {
            tracing::warn!(%error, "errors of GPUs are not watched for");
        }
    }
}

/// Waits for errors of GPUs until nobody wants them. A GPU that is lost is told once and no longer waited for.
fn watch(nvml: &Nvml, infos: &[GpuInfo], errors: &mpsc::Sender<GpuError>) {
    let mut watched: Vec<(&GpuInfo, Device<'_>)> = infos.iter().filter_map(|info| able(nvml, info)).collect();
    while let Some(set) = register(nvml, &mut watched) {
        let lost = loop {
            match set.wait(GPU_WAIT_MS) {
                _ if errors.is_closed() => return,
                Err(NvmlError::Timeout) => {}
                Ok(event) => tell(errors, &watched, &event),
                Err(NvmlError::GpuLost) => {
                    break watched.iter().position(|(_, device)| matches!(device.memory_info(), Err(NvmlError::GpuLost)));
                }
                Err(error) => {
                    tracing::warn!(%error, "errors of GPUs are not told from now on");
                    return;
                }
            }
        };
        let Some(lost) = lost else {
            tracing::warn!("a GPU is lost, and which is not known: errors of GPUs are not told from now on");
            return;
        };
        let (info, _) = watched.remove(lost);
        send(errors, info, FELL_OFF_XID);
    }
}

/// A GPU that tells of its errors; of another that is said once.
fn able<'a, 'nvml>(nvml: &'nvml Nvml, info: &'a GpuInfo) -> Option<(&'a GpuInfo, Device<'nvml>)> {
    let device = nvml.device_by_index(info.index);
    let able = device.and_then(|device| Ok((device.supported_event_types()?.contains(EventTypes::CRITICAL_XID_ERROR), device)));
    match able {
        Ok((true, device)) => Some((info, device)),
        Ok((false, _)) => {
            tracing::warn!(gpu = info.index, "this GPU does not tell of its errors");
            None
        }
        Err(error) => {
            tracing::warn!(gpu = info.index, %error, "this GPU does not tell of its errors");
            None
        }
    }
}

/// One set for all; `None` when there is nothing to wait for. A set into which one GPU could not be taken is gone, so it is begun anew without.
fn register<'nvml>(nvml: &'nvml Nvml, watched: &mut Vec<(&GpuInfo, Device<'nvml>)>) -> Option<EventSet<'nvml>> {
    while !watched.is_empty() {
        let begun = nvml.create_event_set().inspect_err(|error| tracing::warn!(%error, "errors of GPUs are not told")).ok()?;
        let mut set = Some(begun);
        let refused = watched.iter().position(|(info, device)| {
            let own = set.take().and_then(|set| {
                let registered = device.register_events(EventTypes::CRITICAL_XID_ERROR, set);
                registered
                    .inspect_err(|error| tracing::warn!(gpu = info.index, error = %error.error, "this GPU does not tell of its errors"))
                    .ok()
            });
            set = own;
            set.is_none()
        });
        match refused {
            Some(index) => drop(watched.remove(index)),
            None => return set,
        }
    }
    None
}

fn tell(errors: &mpsc::Sender<GpuError>, watched: &[(&GpuInfo, Device<'_>)], event: &EventData<'_>) {
    let xid = match event.event_data {
        Some(XidError::Value(number)) => u32::try_from(number).unwrap_or(UNKNOWN_XID),
        Some(XidError::Unknown) => UNKNOWN_XID,
        None => return,
    };
    // SAFETY: the handles are only compared. A GPU that fell off the bus may not tell its id any more.
    let same = |device: &Device<'_>| unsafe { device.handle() == event.device.handle() };
    match watched.iter().find(|(_, device)| same(device)) {
        Some((info, _)) => send(errors, info, xid),
        None => tracing::warn!(xid, "an error of a GPU that is not known"),
    }
}

fn send(errors: &mpsc::Sender<GpuError>, info: &GpuInfo, xid: u32) {
    let error = GpuError { gpu: info.index, uuid: info.uuid.clone(), xid, at: Timestamp::now() };
    tracing::warn!(gpu = error.gpu, uuid = error.uuid, xid, "{}", error.describe(None));
    if errors.try_send(error).is_err() {
        // The loop is far behind; the log has it.
        tracing::warn!(xid, "an error of a GPU was not taken");
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
