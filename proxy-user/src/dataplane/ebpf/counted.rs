//! What the programs counted for each service port, for whoever asks beside the plane.
//!
//! In: which number each port has, kept by the plane as it writes. Out: the counters, read through the map's name, which
//! is the same one when the map has grown.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{Array, Map, MapData};
use proxy_ebpf::Tally;
use rustc_hash::FxHashMap;

use super::{Tallies, problem::Problem};
use crate::plan::PortId;

/// The number of every service port in the maps. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbered(Arc<Mutex<FxHashMap<PortId, u32>>>);

impl Numbered {
    /// A port has this number now, or is gone.
    pub(super) fn set(&self, id: &PortId, number: Option<u32>) {
        let mut ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match number {
            Some(number) if ports.get(id) == Some(&number) => {}
            Some(number) => drop(ports.insert(id.clone(), number)),
            None => drop(ports.remove(id)),
        }
    }

    /// Nothing is known any more.
    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn all(&self) -> Vec<(PortId, u32)> {
        let ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ports.iter().map(|(id, number)| (id.clone(), *number)).collect()
    }
}

/// Reads what was counted, while the plane works.
#[derive(Clone, Debug)]
pub struct Counted {
    numbered: Numbered,
    map: PathBuf,
}

impl Counted {
    pub(super) fn new(numbered: Numbered, map: PathBuf) -> Self {
        Self { numbered, map }
    }

    /// What was counted for every service port.
    ///
    /// # Errors
    ///
    /// When the map is not there, or cannot be read.
    pub fn read(&self) -> Result<Tallies, Problem> {
        let ports = self.numbered.all();
        if ports.is_empty() {
            return Ok(Tallies::new());
        }
        let wrong = |error| Problem::map("tallies", error);
        let map = Map::Array(MapData::from_pin(&self.map).map_err(wrong)?);
        let tallies: Array<_, Tally> = map.try_into().map_err(wrong)?;
        let read = |(id, number)| Ok((id, tallies.get(&number, 0).map_err(wrong)?));
        ports.into_iter().map(read).collect()
    }
}
