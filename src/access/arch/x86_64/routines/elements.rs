//! Copies of elements, in ascending order and without tearing.

use core::arch::naked_asm;

/// Defines the routine that copies elements of one size.
macro_rules! element_routine {
    ($name:ident, $size:literal, $load:literal, $store:literal) => {
        /// Copies elements one by one, in ascending order.
        ///
        /// # Safety
        ///
        /// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap.
        /// `rcx` is a multiple of the size of an element.
        #[unsafe(naked)]
        pub(in crate::access::arch) unsafe extern "sysv64" fn $name() {
            naked_asm!(
                "xor edx, edx",
                "2:",
                "cmp rdx, rcx",
                "jae 4f",
                $load,
                $store,
                concat!("add rdx, ", $size),
                "jmp 2b",
                "4:",
                "xor eax, eax",
                "3:",
                "ret",
                fault_entry!("2b", "3b", "3b", "1"),
            )
        }
    };
}

element_routine!(
    elements_of_2,
    "2",
    "movzx eax, word ptr [rsi + rdx]",
    "mov word ptr [rdi + rdx], ax"
);
element_routine!(
    elements_of_4,
    "4",
    "mov eax, dword ptr [rsi + rdx]",
    "mov dword ptr [rdi + rdx], eax"
);
element_routine!(
    elements_of_8,
    "8",
    "mov rax, qword ptr [rsi + rdx]",
    "mov qword ptr [rdi + rdx], rax"
);

/// Copies vectors of 32 bytes, in ascending order.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap. `rcx` is a
/// multiple of 32. The processor has AVX.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn vectors_avx() {
    naked_asm!(
        "2:",
        "xor edx, edx",
        "sub rcx, 128",
        "jb 5f",
        "4:",
        "vmovups ymm0, ymmword ptr [rsi + rdx]",
        "vmovups ymm1, ymmword ptr [rsi + rdx + 32]",
        "vmovups ymm2, ymmword ptr [rsi + rdx + 64]",
        "vmovups ymm3, ymmword ptr [rsi + rdx + 96]",
        "vmovups ymmword ptr [rdi + rdx], ymm0",
        "vmovups ymmword ptr [rdi + rdx + 32], ymm1",
        "vmovups ymmword ptr [rdi + rdx + 64], ymm2",
        "vmovups ymmword ptr [rdi + rdx + 96], ymm3",
        "add rdx, 128",
        "sub rcx, 128",
        "jae 4b",
        "5:",
        "add rcx, 128",
        "jz 7f",
        "6:",
        "vmovups ymm0, ymmword ptr [rsi + rdx]",
        "vmovups ymmword ptr [rdi + rdx], ymm0",
        "add rdx, 32",
        "sub rcx, 32",
        "jnz 6b",
        "7:",
        "xor eax, eax",
        "3:",
        "vzeroupper",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Copies vectors of 16 bytes, in ascending order.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap. `rcx` is a
/// multiple of 32.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn vectors_sse() {
    naked_asm!(
        "xor edx, edx",
        "2:",
        "cmp rdx, rcx",
        "jae 4f",
        "movups xmm0, xmmword ptr [rsi + rdx]",
        "movups xmm1, xmmword ptr [rsi + rdx + 16]",
        "movups xmmword ptr [rdi + rdx], xmm0",
        "movups xmmword ptr [rdi + rdx + 16], xmm1",
        "add rdx, 32",
        "jmp 2b",
        "4:",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}
