"""Names of CPUID feature bits, as /proc/cpuinfo and QEMU spell them."""

from __future__ import annotations

from typing import NamedTuple


class Word(NamedTuple):
    """A register of a CPUID leaf that holds feature bits."""

    leaf: int
    subleaf: int
    register: str


def _row(text: str) -> dict[str, int]:
    """Names from bit 0 up, ``-`` for a bit without one."""
    return {name: bit for bit, name in enumerate(text.split()) if name != "-"}


WORDS: dict[Word, dict[str, int]] = {
    Word(1, 0, "ecx"): _row(
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 "
        "sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"
    ),
    Word(1, 0, "edx"): _row(
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr "
        "sse sse2 ss ht tm ia64 pbe"
    ),
    Word(7, 0, "ebx"): _row(
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx "
        "rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf avx512er "
        "avx512cd sha_ni avx512bw avx512vl"
    ),
    Word(7, 0, "ecx"): _row(
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni "
        "avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid kl bus_lock_detect cldemote - movdiri "
        "movdir64b enqcmd sgx_lc pks"
    ),
    Word(7, 0, "edx"): _row(
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear "
        "rtm_always_abort - - serialize hybrid tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile "
        "amx_int8 spec_ctrl stibp_intel flush_l1d arch_capabilities core_capabilities ssbd"
    ),
    Word(7, 1, "eax"): _row(
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns "
        "- amx_fp16 hreset avx_ifma - - lam"
    ),
    Word(7, 1, "edx"): _row("- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti"),
    Word(7, 2, "edx"): _row("psfd_ctrl ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    Word(0xD, 0, "eax"): _row(
        "xcr0_x87 xcr0_sse xcr0_avx xcr0_bndregs xcr0_bndcsr xcr0_opmask xcr0_zmm_hi256 xcr0_hi16_zmm xcr0_pt "
        "xcr0_pkru - - - - - - - xcr0_tilecfg xcr0_tiledata"
    ),
    Word(0xD, 1, "eax"): _row("xsaveopt xsavec xgetbv1 xsaves xfd"),
    Word(0x40000001, 0, "eax"): _row(
        "kvmclock kvm_nop_io_delay kvm_mmu_op kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - "
        "kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int "
        "kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable"
    ),
    Word(0x80000001, 0, "ecx"): _row(
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - "
        "lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx"
    ),
    Word(0x80000001, 0, "edx"): _row(
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
    ),
    Word(0x80000007, 0, "edx"): _row("- - - - - - - - invtsc"),
    Word(0x80000008, 0, "ebx"): _row(
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp - stibp_always_on - - - - - - "
        "amd_ssbd virt_ssbd amd_ssb_no - amd_psfd"
    ),
    Word(0x80000021, 0, "eax"): _row(
        "no_nested_data_bp - lfence_always_serializing - - - null_sel_clr_base - autoibrs"
    ),
}
"""Feature words and their bits. A bit without a name is reported by its number."""

BIT_OF: dict[str, tuple[Word, int]] = {
    name: (word, bit) for word, names in WORDS.items() for name, bit in names.items()
}
"""Where a named feature lives."""
