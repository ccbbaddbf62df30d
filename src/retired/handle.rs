//! Retired versions that are freed by their last reader, not by the list.

use super::list::Version;
use super::sync::{fence, Arc, Ordering, Weak};

/// A handle to a retired version. It keeps the version alive and is not a reader of it.
#[derive(Debug)]
pub(crate) struct RetiredHandle<T> {
    /// Identifies this handle to the [`WeakVersion`]. Dropped before `value`: fields are dropped in
    /// the order of their declaration.
    token: Arc<()>,
    value: Arc<T>,
}

/// A retired version that its readers, and at most one [`RetiredHandle`], keep alive.
#[derive(Debug)]
pub(crate) struct WeakVersion<T> {
    number: u64,
    value: Weak<T>,
    /// Dangling, or the token of the handle.
    token: Weak<()>,
}

/// Returns whether a version that was just replaced has readers. `value` is not a reader.
fn has_readers<T>(value: &Arc<T>) -> bool {
    let owners = Arc::strong_count(value);
    // After the load of the count, and before the writer unlocks: see `super::list`.
    fence(Ordering::Acquire);
    owners > 1
}

impl<T> WeakVersion<T> {
    /// Creates a version that has no handle, or `None` if it has no readers.
    pub(crate) fn new(number: u64, value: &Arc<T>) -> Option<Self> {
        has_readers(value).then(|| Self {
            number,
            value: Arc::downgrade(value),
            token: Weak::new(),
        })
    }
}

impl<T> RetiredHandle<T> {
    /// Creates a handle, and the version for the list, or `None` if it has no readers.
    pub(crate) fn new(number: u64, value: Arc<T>) -> (Self, Option<WeakVersion<T>>) {
        let token = Arc::new(());
        let version = has_readers(&value).then(|| WeakVersion {
            number,
            value: Arc::downgrade(&value),
            token: Arc::downgrade(&token),
        });
        (Self { token, value }, version)
    }

    /// Returns the value.
    pub(crate) fn value(&self) -> &T {
        &self.value
    }

    /// Returns the value itself, if it has no other owner.
    ///
    /// # Errors
    ///
    /// Returns the handle if the value has another owner.
    pub(crate) fn into_value(self) -> Result<T, Self> {
        let Self { token, value } = self;
        // On success, the value is gone before the token. `readers` then subtracts 1 from 0, which
        // saturates at 0.
        Arc::try_unwrap(value).map_err(|value| Self { token, value })
    }
}

impl<T> Version for WeakVersion<T> {
    const SPARES: usize = 0;

    fn number(&self) -> u64 {
        self.number
    }

    fn readers(&self) -> usize {
        let owners = Weak::strong_count(&self.value);
        // A handle drops its token and then its value, with a release operation. If `owners` lacks
        // the value, the fence makes the drop of the token visible: the count of readers is never
        // too low. Otherwise it may be one too high for a moment.
        fence(Ordering::Acquire);
        owners.saturating_sub(Weak::strong_count(&self.token))
    }
}
