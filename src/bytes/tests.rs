use super::*;

/// A container that has the required methods only.
struct Minimal(std::cell::RefCell<Vec<u8>>);

impl Bytes<u8> for Minimal {
    type E = &'static str;
    fn write(&self, buf: &[u8], addr: u8) -> Result<usize, Self::E> {
        self.write_slice(buf, addr).map(|()| buf.len())
    }
    fn read(&self, buf: &mut [u8], addr: u8) -> Result<usize, Self::E> {
        self.read_slice(buf, addr).map(|()| buf.len())
    }
    fn write_slice(&self, buf: &[u8], addr: u8) -> Result<(), Self::E> {
        let range = usize::from(addr)..usize::from(addr) + buf.len();
        self.0
            .borrow_mut()
            .get_mut(range)
            .ok_or("outside")?
            .copy_from_slice(buf);
        Ok(())
    }
    fn read_slice(&self, buf: &mut [u8], addr: u8) -> Result<(), Self::E> {
        let range = usize::from(addr)..usize::from(addr) + buf.len();
        buf.copy_from_slice(self.0.borrow().get(range).ok_or("outside")?);
        Ok(())
    }
    fn read_volatile_from<F: ReadVolatile>(
        &self,
        _: u8,
        _: &mut F,
        _: usize,
    ) -> Result<usize, Self::E> {
        Err("not a stream")
    }
    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        _: u8,
        _: &mut F,
        _: usize,
    ) -> Result<(), Self::E> {
        Err("not a stream")
    }
    fn write_volatile_to<F: WriteVolatile>(
        &self,
        _: u8,
        _: &mut F,
        _: usize,
    ) -> Result<usize, Self::E> {
        Err("not a stream")
    }
    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        _: u8,
        _: &mut F,
        _: usize,
    ) -> Result<(), Self::E> {
        Err("not a stream")
    }
    fn store<T: AtomicAccess>(&self, _: T, _: u8, _: Ordering) -> Result<(), Self::E> {
        Err("not atomic")
    }
    fn load<T: AtomicAccess>(&self, _: u8, _: Ordering) -> Result<T, Self::E> {
        Err("not atomic")
    }
}

#[test]
fn read_obj_and_write_obj_by_default_use_slice_methods() {
    let container = Minimal(vec![0; 8].into());
    container.write_obj(0xaabbu16, 6).unwrap();
    assert_eq!(container.read_obj::<u16>(6), Ok(0xaabb));
    assert_eq!(container.read_obj::<u16>(7), Err("outside"));
    assert_eq!(container.write_obj(1u64, 1), Err("outside"));
}
