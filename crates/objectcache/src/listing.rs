//! Which layers a store has: one list of its objects has those that it reaches, and each of the
//! others is asked for.

use futures::{StreamExt as _, TryStreamExt as _, stream};
use shipway_fault::Result;
use shipway_oci::{Descriptor, Digest};
use std::collections::{HashMap, HashSet};

/// From so many layers on, a list of what is there is asked for first.
pub(crate) const LIST_FROM: usize = 3;
/// Questions about single objects at once.
pub(crate) const QUESTIONS: usize = 16;

/// The first objects below a prefix.
pub(crate) struct Listing<T> {
    objects: HashMap<String, T>,
    reach: Reach,
}

/// Up to which name these are all objects that there are.
enum Reach {
    Nothing,
    UpTo(String),
    Everything,
}

impl<T: Copy> Listing<T> {
    /// One that lists no object.
    pub fn nothing() -> Self {
        Self { objects: HashMap::new(), reach: Reach::Nothing }
    }

    /// The first page of a list, in order of names; `more` if others follow.
    pub fn page(objects: Vec<(String, T)>, more: bool) -> Self {
        let last = objects.last().filter(|_| more).map(|(name, _)| name.clone());
        let reach = last.map_or(Reach::Everything, Reach::UpTo);
        Self { objects: objects.into_iter().collect(), reach }
    }

    /// `list` if there are enough layers to ask for one.
    pub async fn of(
        layers: &[Descriptor],
        list: impl Future<Output = Result<Self>>,
    ) -> Result<Self> {
        if layers.len() < LIST_FROM { Ok(Self::nothing()) } else { list.await }
    }

    /// What the list says of an object; `None` if it does not reach that far.
    pub fn find(&self, name: &str) -> Option<Option<T>> {
        let reaches = match &self.reach {
            Reach::Nothing => false,
            Reach::UpTo(last) => name <= last.as_str(),
            Reach::Everything => true,
        };
        reaches.then(|| self.objects.get(name).copied())
    }
}

/// Those of `layers` of which `look` says that they are there, so many questions at once.
pub(crate) async fn present<F>(
    layers: &[Descriptor],
    at_once: usize,
    look: impl Fn(Descriptor) -> F,
) -> Result<HashSet<Digest>>
where
    F: Future<Output = Result<bool>> + Send,
{
    let asked = layers.iter().map(|layer| {
        let (digest, answer) = (layer.digest, look(layer.clone()));
        async move { answer.await.map(|there| there.then_some(digest)) }
    });
    let found: Vec<Option<Digest>> =
        stream::iter(asked.collect::<Vec<_>>()).buffer_unordered(at_once).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}
