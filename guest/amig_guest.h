/* SPDX-License-Identifier: Apache-2.0
 *
 * amig_guest.h: everything that amig's guest image and the outside world share.
 *
 * The image writes the status page and one block for each vCPU; the host writes the control page. No word has two
 * writers. All numbers are little-endian; 64-bit words are aligned and may be read at any time. The host's mirror is
 * amig/host/guest_abi.py; a test compares the two.
 *
 * Boot
 *   The image is an ELF64 file, loaded at its physical addresses (1 MiB up), entered the PVH way
 *   (XEN_ELFNOTE_PHYS32_ENTRY): 32-bit protected mode, flat segments, paging off, EBX = hvm_start_info.
 *   Further vCPUs: the ELF note named "amig", type AMIG_NOTE_BOOT (struct amig_note) gives a second 32-bit entry. A
 *   host that knows it starts vCPU 1..N-1 there, in the same state as the first one (CS, DS, ES, SS flat 4 GiB, paging
 *   off, EFLAGS = 2) with EDI = vCPU number (EBX is not used). They may start before or after vCPU 0. The command line
 *   must then contain "vcpus=N".
 *   Memory from AMIG_STATUS_GPA to AMIG_SHARED_END must be RAM. The command line and the memory map are copied before
 *   anything is written there, but a host does better to keep them elsewhere.
 *   After boot all code runs in ring 3 with IOPL 3 and interrupts never come: a vCPU is never halted.
 *
 * Ports
 *   AMIG_PORT_PROBE  IN  32 bit: AMIG_PROBE_MAGIC when the host serves the wait port; anything else: the guest spins.
 *   AMIG_PORT_WAIT   OUT 32 bit: microseconds; the host completes the access after about so long (or earlier).
 *   AMIG_PORT_EXIT   OUT 32 bit: the workload has ended ("seconds=N"): 0 memory intact, 1 mismatches were found,
 *                    2 the guest can't work (status.error, or a vCPU took an exception). The guest stays alive, idle.
 *   AMIG_PORT_SERIAL COM1, polled; written with REP OUTSB of up to 16 bytes whenever LSR says the FIFO is empty.
 */
#ifndef AMIG_GUEST_H
#define AMIG_GUEST_H

#define AMIG_GUEST_ABI 1    /* layout of this header */
#define AMIG_GUEST_IMAGE 1  /* behaviour of the image */

#define AMIG_STATUS_MAGIC 0x5453455547494d41 /* "AMIGUEST" */
#define AMIG_STATUS_GPA 0x10000              /* struct amig_status, one page, written by vCPU 0 */
#define AMIG_CONTROL_GPA 0x11000             /* struct amig_control, one page, written by the host */
#define AMIG_CPU_GPA 0x12000                 /* struct amig_cpu for each vCPU, written by that vCPU */
#define AMIG_CPU_STRIDE 1024
#define AMIG_MAX_CPUS 64
#define AMIG_SHARED_END 0x22000              /* AMIG_CPU_GPA + AMIG_MAX_CPUS * AMIG_CPU_STRIDE */
#define AMIG_PAGE_SIZE 4096
#define AMIG_MAX_RANGES 8
#define AMIG_MAX_MISMATCHES 8

#define AMIG_PORT_WAIT 0xa310
#define AMIG_PORT_PROBE 0xa314
#define AMIG_PORT_EXIT 0xa318
#define AMIG_PORT_SERIAL 0x3f8
#define AMIG_PROBE_MAGIC 0x47494d41 /* "AMIG" */

#define AMIG_NOTE_BOOT 1 /* type of the ELF note; its name is "amig" */

/* status.state and cpu.state */
#define AMIG_STATE_BOOT 0
#define AMIG_STATE_FILLING 1 /* memory is being filled before the workload starts */
#define AMIG_STATE_RUNNING 2 /* filled on every vCPU: the workload runs */
#define AMIG_STATE_DONE 3    /* "seconds=N" are over; idle */
#define AMIG_STATE_ERROR 4   /* can't work: status.error, status.message */
#define AMIG_STATE_FAULT 5   /* this vCPU (status: some vCPU) took an exception: cpu.fault_* */
#define AMIG_STATE_FILLED 6  /* cpu only: this vCPU has filled its share and waits for the others */

/* status.error */
#define AMIG_ERROR_NONE 0
#define AMIG_ERROR_MEMORY 1  /* the memory map has no room for what was asked */
#define AMIG_ERROR_OPTION 2  /* a command-line word has a value that makes no sense */

/* status.workload */
#define AMIG_WORK_IDLE 0
#define AMIG_WORK_FILL 1
#define AMIG_WORK_SEQUENTIAL 2
#define AMIG_WORK_RANDOM 3
#define AMIG_WORK_HOTSPOT 4
#define AMIG_WORK_CHECK 5

/* status.write_mode */
#define AMIG_WRITE_BYTE 0
#define AMIG_WRITE_PAGE 1

/* status.fill */
#define AMIG_FILL_NONE 0
#define AMIG_FILL_ZERO 1
#define AMIG_FILL_CONST 2
#define AMIG_FILL_TEXT 3
#define AMIG_FILL_RANDOM 4
#define AMIG_FILL_MIXED 5 /* even pages random, odd pages constant */

/* status.tsc_source */
#define AMIG_TSC_OPTION 1
#define AMIG_TSC_CPUID 2
#define AMIG_TSC_PIT 3
#define AMIG_TSC_GUESS 4

/* amig_mismatch.kind */
#define AMIG_BAD_STALE 1   /* the right page, whole, of an older generation: a write was lost */
#define AMIG_BAD_TORN 2    /* the right page, in part of another generation or altered */
#define AMIG_BAD_ZERO 3    /* all zero */
#define AMIG_BAD_FOREIGN 4 /* another page's content, whole */
#define AMIG_BAD_GARBAGE 5 /* none of these */
#define AMIG_BAD_NEWER 6   /* the right page, whole, newer than its entry in the generation table: the table is stale */

/* amig_mismatch.phase */
#define AMIG_PHASE_REWRITE 1 /* found before the page was written again */
#define AMIG_PHASE_RANDOM 2  /* found by a random look */
#define AMIG_PHASE_PASS 3    /* found by the rolling pass */
#define AMIG_PHASE_REQUEST 4 /* found by the complete verification that the host asked for */

#ifndef __ASSEMBLER__
#include <stdint.h>

struct amig_range {
    uint64_t gpa;
    uint64_t pages;
};

/* AMIG_STATUS_GPA. `magic` is written last, after everything up to `message` is valid. */
struct amig_status {
    uint64_t magic;
    uint32_t abi;
    uint32_t image;
    uint32_t state;
    uint32_t error;
    uint32_t workload;
    uint32_t write_mode;
    uint32_t fill;
    uint32_t wait_port; /* 1: the host serves the wait port; 0: the guest spins */
    uint32_t vcpus;     /* "vcpus=N" */
    uint32_t cpus_ready; /* vCPUs that have filled their share */
    uint32_t tsc_khz;
    uint32_t tsc_source;
    uint32_t tick_us;
    uint32_t slice_us;
    uint32_t hot_writes; /* per cent */
    uint32_t hot_pages;  /* per cent */
    uint64_t seed;
    uint64_t rate_pages; /* page writes a second, of all vCPUs together; 0: unpaced */
    uint64_t ram_pages;  /* usable pages outside the image */
    uint64_t ws_pages;
    uint64_t fill_pages;
    uint64_t gen_gpa;   /* generation tables of all vCPUs (uint32_t for each page of the working set) */
    uint64_t gen_pages;
    uint64_t boot_tsc;
    uint64_t ready_tsc; /* when state became RUNNING */
    uint32_t ws_ranges;
    uint32_t reserved;
    struct amig_range ws[AMIG_MAX_RANGES]; /* the working set: page 0 is ws[0].gpa; vCPU c owns cpu.first_page .. */
    char message[128];  /* state ERROR: what is wrong */
    char cmdline[1024]; /* as understood, cut */
};

/* AMIG_CONTROL_GPA. Zeroed by the guest at boot (before status.magic), then written by the host only. */
struct amig_control {
    uint64_t gap_reset;      /* a new number: every vCPU forgets its largest gap and copies the number to gap_ack */
    uint64_t verify_request; /* a new number: every vCPU verifies its whole share and copies it to verify_done */
    uint64_t quiesce;        /* not 0: no writes but to the vCPU blocks (and the stacks); copied to cpu.quiesced */
};

struct amig_mismatch {
    uint64_t page; /* number in the working set */
    uint64_t gpa;
    uint64_t expected_gen;
    uint64_t found_page;
    uint64_t found_gen;
    uint32_t kind;
    uint32_t word; /* first 64-bit word of the page that is not as expected */
    uint32_t phase;
    uint32_t cpu;
    uint64_t tsc;
};

/* AMIG_CPU_GPA + vCPU * AMIG_CPU_STRIDE */
struct amig_cpu {
    uint64_t heartbeat; /* advances at least every 0.1 ms while working, once a tick while waiting */
    uint64_t tsc;       /* at the last heartbeat */
    uint64_t writes;    /* pages written by the workload */
    uint64_t verified;  /* pages verified */
    uint64_t passes;    /* check: complete rolling passes; sequential: rounds over the share */
    uint64_t mismatches;
    uint64_t gap_ack;
    uint64_t gap_max;   /* largest distance of two heartbeats since gap_reset, in TSC ticks */
    uint64_t gap_tsc;   /* TSC at the end of that gap */
    uint64_t verify_done;
    uint64_t verify_pages;      /* pages verified by the last request */
    uint64_t verify_mismatches; /* mismatches found by it */
    uint32_t state;
    uint32_t quiesced;   /* lower half of control.quiesce, stored after the last write; 0: writing */
    uint64_t first_page; /* its share of the working set */
    uint64_t pages;
    uint64_t filled;     /* pages filled before the workload started */
    uint64_t waits;      /* uses of the wait port */
    uint64_t skipped;    /* writes given up because the vCPU was held up for longer than the burst limit */
    uint64_t gen_gpa;    /* its generation table */
    uint64_t fault_vector;
    uint64_t fault_error;
    uint64_t fault_rip;
    uint64_t fault_cr2;
    uint64_t fault_rsp;
    uint64_t reserved[16];
    struct amig_mismatch mismatch[AMIG_MAX_MISMATCHES]; /* the first ones; valid below `mismatches` */
    uint8_t padding[192];
};

/* descriptor of the ELF note "amig", type AMIG_NOTE_BOOT */
struct amig_note {
    uint32_t abi;
    uint32_t ap_entry;   /* 32-bit physical entry of vCPU 1..N-1 */
    uint32_t status_gpa;
    uint32_t max_cpus;
};

_Static_assert(sizeof(struct amig_status) <= AMIG_PAGE_SIZE, "status page");
_Static_assert(sizeof(struct amig_mismatch) == 64, "one cache line");
_Static_assert(sizeof(struct amig_cpu) == AMIG_CPU_STRIDE, "vCPU block");
_Static_assert(AMIG_SHARED_END == AMIG_CPU_GPA + AMIG_MAX_CPUS * AMIG_CPU_STRIDE, "shared area");
#endif
#endif
