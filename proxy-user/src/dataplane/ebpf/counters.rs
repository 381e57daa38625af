//! Counters of each service port, for readers beside the plane.
//!
//! In: the index of each port, which the plane stores when it writes the port. Out: the counters. They are
//! read through the name of the map, which stays the same when the map has grown.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{Array, Map, MapData};
use proxy_ebpf::Tally;
use rustc_hash::FxHashMap;

use super::problem::Problem;
use crate::plan::PortId;

/// The index of every service port in the map `tallies`. Clones share one table.
#[derive(Clone, Debug, Default)]
pub(super) struct PortIndices(Arc<Mutex<FxHashMap<PortId, u32>>>);

impl PortIndices {
    /// Stores the index of a port; `None` if the port is gone.
    pub(super) fn set(&self, id: &PortId, index: Option<u32>) {
        let mut ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match index {
            Some(index) if ports.get(id) == Some(&index) => {}
            Some(index) => drop(ports.insert(id.clone(), index)),
            None => drop(ports.remove(id)),
        }
    }

    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn all(&self) -> Vec<(PortId, u32)> {
        let ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ports.iter().map(|(id, index)| (id.clone(), *index)).collect()
    }
}

/// Reads the counters while the plane works.
#[derive(Clone, Debug)]
pub struct Counters {
    port_indices: PortIndices,
    map: PathBuf,
}

impl Counters {
    pub(super) fn new(port_indices: PortIndices, map: PathBuf) -> Self {
        Self { port_indices, map }
    }

    /// The counters of every service port since it got its index.
    ///
    /// # Errors
    ///
    /// When the map does not exist, or cannot be read.
    pub fn read(&self) -> Result<BTreeMap<PortId, Tally>, Problem> {
        let ports = self.port_indices.all();
        if ports.is_empty() {
            return Ok(BTreeMap::new());
        }
        let wrong = |error| Problem::map("tallies", error);
        let map = Map::Array(MapData::from_pin(&self.map).map_err(wrong)?);
        let tallies: Array<_, Tally> = map.try_into().map_err(wrong)?;
        let read = |(id, index)| Ok((id, tallies.get(&index, 0).map_err(wrong)?));
        ports.into_iter().map(read).collect()
    }
}
