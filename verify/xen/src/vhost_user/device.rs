//! The device: it returns the bytes of each request, inverted.

use std::io::{self, Read, Write};
use std::sync::RwLock;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{
    Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier,
};

/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_ACCESS_PLATFORM`: addresses are grants.
const FEATURES: u64 = 1 << 32 | 1 << 33;
/// The largest request.
const MOST_BYTES: u64 = 64 << 10;

type Memory = GuestMemoryMmap<()>;

/// A device with one queue.
#[derive(Debug)]
pub struct Device {
    memory: Option<GuestMemoryAtomic<Memory>>,
    exit: RwLock<Option<(EventConsumer, EventNotifier)>>,
}

impl Device {
    /// Creates a device without memory.
    pub fn new() -> io::Result<Self> {
        let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK)?;
        Ok(Self {
            memory: None,
            exit: RwLock::new(Some(exit)),
        })
    }

    /// Serves a request, and returns the number of bytes written.
    ///
    /// `Reader` and `Writer` of virtio-queue use the pointer of a guard and do not check its error,
    /// so a device must know that the pages are granted before it uses them.
    fn serve(
        memory: &Memory,
        chain: &DescriptorChain<GuestMemoryLoadGuard<Memory>>,
    ) -> io::Result<u32> {
        let mut bytes = Vec::new();
        for descriptor in chain.clone().readable() {
            let from = bytes.len();
            let len = u64::from(descriptor.len()).min(MOST_BYTES);
            let len = usize::try_from(len).map_err(io::Error::other)?;
            bytes.resize(from + len, 0);
            let place = bytes.get_mut(from..).unwrap_or_default();
            memory
                .read_slice(place, descriptor.addr())
                .map_err(io::Error::other)?;
        }
        let mut again = Vec::new();
        let reader = chain.clone().reader(memory).map_err(io::Error::other)?;
        reader.take(MOST_BYTES).read_to_end(&mut again)?;
        if again != bytes {
            return Err(io::ErrorKind::InvalidData.into());
        }
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        let mut writer = chain.clone().writer(memory).map_err(io::Error::other)?;
        writer.write_all(&bytes)?;
        u32::try_from(bytes.len()).map_err(io::Error::other)
    }
}

impl VhostUserBackendMut for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        usize::from(super::driver::SIZE)
    }

    fn features(&self) -> u64 {
        FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::XEN_MMAP | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.write().ok()?.take()
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let vring = vrings.first().ok_or(io::ErrorKind::NotFound)?;
        loop {
            let chain = {
                let mut vring = vring.get_mut();
                let queue = vring.get_queue_mut();
                let mut chains = queue.iter(memory.memory()).map_err(io::Error::other)?;
                chains.next()
            };
            let Some(chain) = chain else { return Ok(()) };
            let written = Self::serve(&memory.memory(), &chain).unwrap_or(0);
            vring
                .add_used(chain.head_index(), written)
                .map_err(io::Error::other)?;
            vring.signal_used_queue()?;
        }
    }
}
