//! What keeps a mapping that was made elsewhere.

use std::any::Any;
use std::fmt::Debug;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;

/// An object that a region keeps, and hands out to who knows its type.
#[derive(Clone, Debug)]
pub(super) struct Owner(Arc<dyn Kept>);

/// What every kind of region is anyway, so that keeping something takes no ability away from it.
trait Kept: Any + Debug + Send + Sync + UnwindSafe + RefUnwindSafe {}

impl<T: Any + Debug + Send + Sync + UnwindSafe + RefUnwindSafe> Kept for T {}

impl Owner {
    pub(super) fn new<T: Any + Debug + Send + Sync + UnwindSafe + RefUnwindSafe>(
        owner: Arc<T>,
    ) -> Self {
        Self(owner)
    }

    /// The object, if it is one of this type.
    pub(super) fn get<T: Any>(&self) -> Option<&T> {
        let any: &dyn Any = &*self.0;
        any.downcast_ref()
    }
}
