//! [`Owner`]: the object that keeps a borrowed mapping in place.

use std::any::Any;
use std::fmt::Debug;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;

/// An object of any type that a region keeps alive, and returns to a caller that names the type.
#[derive(Clone, Debug)]
pub(super) struct Owner(Arc<dyn Keepable>);

/// The traits that every region implements. An owner has them too, so that a region with an owner
/// still implements them.
trait Keepable: Any + Debug + Send + Sync + UnwindSafe + RefUnwindSafe {}

impl<T: Any + Debug + Send + Sync + UnwindSafe + RefUnwindSafe> Keepable for T {}

impl Owner {
    pub(super) fn new<T: Any + Debug + Send + Sync + UnwindSafe + RefUnwindSafe>(
        owner: Arc<T>,
    ) -> Self {
        Self(owner)
    }

    /// Returns the object, if it is a `T`.
    pub(super) fn get<T: Any>(&self) -> Option<&T> {
        let any: &dyn Any = &*self.0;
        any.downcast_ref()
    }
}
