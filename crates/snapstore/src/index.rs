//! All rows in memory, found by name, parent and chain ID.

use crate::{
    model::{Backing, Kind, Name, Row, mapped_ids},
    mounts::Point,
};
use shipway_fault::{Code, Fault, Result};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    sync::Arc,
};

#[derive(Default)]
pub(crate) struct Index {
    rows: BTreeMap<Name, Arc<Row>>,
    children: HashMap<Name, usize>,
    chains: HashMap<Box<str>, BTreeSet<Name>>,
    /// Names of each place.
    places: HashMap<Backing, Vec<Name>>,
    /// Whether labels that map ids count.
    remap_ids: bool,
    /// How many snapshots that can be written or viewed need what to be mounted.
    wanted: HashMap<Point, usize>,
}

impl Index {
    pub(crate) fn rows(&self) -> &BTreeMap<Name, Arc<Row>> {
        &self.rows
    }

    /// An index that counts what is wanted for user namespaces, or not.
    pub(crate) fn new(remap_ids: bool) -> Self {
        Self { remap_ids, ..Self::default() }
    }

    /// What has to be mounted for a snapshot; nothing for a committed one.
    pub(crate) fn points(&self, row: &Row) -> Vec<Point> {
        if row.kind == Kind::Committed {
            return Vec::new();
        }
        // What is missing or wrong is an error on use.
        let below: Vec<_> = self.below(row).map_while(Result::ok).map(|(_, r)| r.backing).collect();
        let ids = if self.remap_ids { mapped_ids(&row.labels).unwrap_or_default() } else { None };
        Point::under(ids.as_ref(), &below)
    }

    /// What has to be mounted.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = &Point> {
        self.wanted.keys()
    }

    pub(crate) fn is_wanted(&self, point: &Point) -> bool {
        self.wanted.contains_key(point)
    }

    /// Puts a row under a name that has none. What is below it has to be there already.
    pub(crate) fn insert(&mut self, name: Name, row: Row) {
        for point in self.points(&row) {
            *self.wanted.entry(point).or_default() += 1;
        }
        if let Some(parent) = &row.parent {
            *self.children.entry(parent.clone()).or_default() += 1;
        }
        if let Some(chain) = row.chain(&name) {
            self.chains.entry(chain.into()).or_default().insert(name.clone());
        }
        self.places.entry(row.backing).or_default().push(name.clone());
        self.rows.insert(name, Arc::new(row));
    }

    pub(crate) fn remove(&mut self, name: &Name) {
        let Some(row) = self.rows.remove(name) else { return };
        for point in self.points(&row) {
            if let Entry::Occupied(mut count) = self.wanted.entry(point) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
        if let Some(parent) = &row.parent {
            let left = self.children.get(parent).map_or(0, |n| n - 1);
            match left {
                0 => drop(self.children.remove(parent)),
                left => drop(self.children.insert(parent.clone(), left)),
            }
        }
        if let Some(names) = self.places.get_mut(&row.backing) {
            names.retain(|n| n != name);
            if names.is_empty() {
                self.places.remove(&row.backing);
            }
        }
        if let Some(chain) = row.chain(name)
            && let Some(names) = self.chains.get_mut(chain)
        {
            names.remove(name);
            if names.is_empty() {
                self.chains.remove(chain);
            }
        }
    }

    pub(crate) fn replace(&mut self, name: &Name, row: Row) {
        self.remove(name);
        self.insert(name.clone(), row);
    }

    pub(crate) fn get(&self, name: &Name) -> Result<&Arc<Row>> {
        self.rows
            .get(name)
            .ok_or_else(|| Fault::not_found(format!("snapshot {name} does not exist")))
    }

    /// The row of a snapshot that others may stand on.
    pub(crate) fn parent(&self, name: &Name) -> Result<&Arc<Row>> {
        let row = self
            .rows
            .get(name)
            .ok_or_else(|| Fault::not_found(format!("parent snapshot {name} does not exist")))?;
        match row.kind {
            Kind::Committed => Ok(row),
            _ => Err(Fault::invalid(format!("parent {name} is not a committed snapshot"))),
        }
    }

    pub(crate) fn vacant(&self, name: &Name) -> Result<()> {
        match self.rows.contains_key(name) {
            true => Err(Fault::new(Code::AlreadyExists, format!("snapshot {name} already exists"))),
            false => Ok(()),
        }
    }

    pub(crate) fn has_children(&self, name: &Name) -> bool {
        self.children.contains_key(name)
    }

    /// The names whose files are there.
    pub(crate) fn names_of(&self, place: Backing) -> &[Name] {
        self.places.get(&place).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn places(&self) -> impl Iterator<Item = Backing> {
        self.places.keys().copied()
    }

    /// Names of all snapshots that have or are to get this chain ID, in their order.
    pub(crate) fn with_chain(&self, chain: &str) -> impl Iterator<Item = (&Name, &Arc<Row>)> {
        let names = self.chains.get(chain).into_iter().flatten();
        names.filter_map(|name| self.rows.get_key_value(name))
    }

    /// The rows below a snapshot, its parent first.
    pub(crate) fn below<'a>(
        &'a self,
        row: &Row,
    ) -> impl Iterator<Item = Result<(&'a Name, &'a Arc<Row>)>> {
        let mut next = row.parent.clone();
        std::iter::from_fn(move || {
            let name = next.take()?;
            let found = self.rows.get_key_value(&name);
            next = found.and_then(|(_, row)| row.parent.clone());
            Some(
                found.ok_or_else(|| {
                    Fault::not_found(format!("parent snapshot {name} does not exist"))
                }),
            )
        })
    }

    /// Whether two snapshots hold the same files all the way down: the same ones, or each of the
    /// same chain ID as its counterpart.
    pub(crate) fn same_chain(&self, one: Option<&Name>, other: Option<&Name>) -> bool {
        let (mut one, mut other) = (one, other);
        loop {
            let (a, b) = match (one, other) {
                (None, None) => return true,
                (Some(a), Some(b)) if a == b => return true,
                (Some(a), Some(b)) => (a, b),
                _ => return false,
            };
            let (Some(x), Some(y)) = (self.rows.get(a), self.rows.get(b)) else { return false };
            let alike =
                x.backing == y.backing || x.chain(a).is_some_and(|chain| y.chain(b) == Some(chain));
            if !alike {
                return false;
            }
            (one, other) = (x.parent.as_ref(), y.parent.as_ref());
        }
    }
}
