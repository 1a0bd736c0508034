/* SPDX-License-Identifier: Apache-2.0
 *
 * options.c: the command line, words of the form key=value. Unknown words belong to somebody else and are ignored; a
 * known word with a value that makes no sense stops the guest, because a silently different workload misleads.
 */
#include "guest.h"

static int same(const char *a, u64 length, const char *b)
{
    for (; length && *b; length--, a++, b++)
        if (*a != *b)
            return 0;
    return !length && !*b;
}

/* Decimal digits; returns how many characters were used, 0 when there is no number or it is too large. */
static u64 digits(const char *text, u64 length, u64 *number)
{
    u64 n = 0, used = 0;

    while (used < length && text[used] >= '0' && text[used] <= '9') {
        if (n > (1ull << 50))
            return 0;
        n = n * 10 + (u64)(text[used++] - '0');
    }
    *number = n;
    return used;
}

static int parse_number(const char *text, u64 length, u64 *number)
{
    return length && digits(text, length, number) == length;
}

/* 4096, 64K, 1G, 256MiB, 900MB (all powers of 1024 but those that end in B without i); "/s" may follow. */
static int parse_size(const char *text, u64 length, u64 *size)
{
    u64 used = digits(text, length, size);
    u64 unit = 1024, power = 0;

    if (!used)
        return 0;
    text += used;
    length -= used;
    if (length >= 2 && text[length - 2] == '/' && text[length - 1] == 's')
        length -= 2;
    if (length) {
        switch (*text | 0x20) {
        case 'k': power = 1; break;
        case 'm': power = 2; break;
        case 'g': power = 3; break;
        case 't': power = 4; break;
        case 'b': return length == 1;
        default: return 0;
        }
        if (length == 2 && (text[1] | 0x20) == 'b')
            unit = 1000;
        else if (length == 3 && text[1] == 'i' && (text[2] | 0x20) == 'b')
            unit = 1024;
        else if (length != 1)
            return 0;
    }
    for (; power; power--) {
        if (*size > (1ull << 53))
            return 0;
        *size *= unit;
    }
    return 1;
}

static int parse_percents(const char *text, u64 length)
{
    u64 writes, pages;
    u64 used = digits(text, length, &writes);

    if (!used || used == length || text[used] != ':')
        return 0;
    if (!parse_number(text + used + 1, length - used - 1, &pages))
        return 0;
    if (writes > 100 || pages > 100 || !pages)
        return 0;
    plan.hot_writes = (u32)writes;
    plan.hot_pages = (u32)pages;
    return 1;
}

/* The position of the value in a list of names separated by '|'. */
static int parse_name(const char *text, u64 length, const char *names, u32 *number)
{
    u32 n = 0;

    while (*names) {
        const char *end = names;

        while (*end && *end != '|')
            end++;
        if ((u64)(end - names) == length) {
            u64 i = 0;

            while (i < length && names[i] == text[i])
                i++;
            if (i == length) {
                *number = n;
                return 1;
            }
        }
        n++;
        names = *end ? end + 1 : end;
    }
    return 0;
}

static int parse_u32(const char *text, u64 length, u32 *number, u64 least, u64 most)
{
    u64 n;

    if (!parse_number(text, length, &n) || n < least || n > most)
        return 0;
    *number = (u32)n;
    return 1;
}

static int option(const char *key, u64 k, const char *v, u64 n)
{
    if (same(key, k, "workload"))
        return parse_name(v, n, "idle|fill|sequential|random|hotspot|check", &plan.workload);
    if (same(key, k, "write"))
        return parse_name(v, n, "byte|page", &plan.write_mode);
    if (same(key, k, "fill"))
        return parse_name(v, n, "none|zero|const|text|random|mixed", &plan.fill);
    if (same(key, k, "ws"))
        return parse_size(v, n, &plan.ws);
    if (same(key, k, "ws_from"))
        return parse_size(v, n, &plan.ws_from);
    if (same(key, k, "fill_size"))
        return parse_size(v, n, &plan.fill_size);
    if (same(key, k, "rate"))
        return parse_size(v, n, &plan.rate);
    if (same(key, k, "hot"))
        return parse_percents(v, n);
    if (same(key, k, "seed"))
        return parse_number(v, n, &plan.seed);
    if (same(key, k, "vcpus"))
        return parse_u32(v, n, &plan.vcpus, 1, AMIG_MAX_CPUS);
    if (same(key, k, "tsc_khz"))
        return parse_number(v, n, &plan.tsc_khz) && plan.tsc_khz < 100000000;
    if (same(key, k, "tick_us"))
        return parse_u32(v, n, &plan.tick_us, 50, 1000000);
    if (same(key, k, "slice_us"))
        return parse_u32(v, n, &plan.slice_us, 50, 1000000);
    if (same(key, k, "burst_us"))
        return parse_u32(v, n, &plan.burst_us, 100, 10000000);
    if (same(key, k, "report"))
        return parse_u32(v, n, &plan.report_s, 0, 1000000);
    if (same(key, k, "seconds"))
        return parse_u32(v, n, &plan.seconds, 0, 1000000);
    if (same(key, k, "crash"))
        return parse_name(v, n, "none|fault|shutdown", &plan.crash);
    if (same(key, k, "spin"))
        return parse_u32(v, n, &plan.spin, 0, 1);
    return 1;
}

void parse_cmdline(const char *text)
{
    plan.vcpus = 1;
    plan.hot_writes = 90;
    plan.hot_pages = 10;
    plan.tick_us = 1000;
    plan.slice_us = 1000;
    plan.burst_us = 50000;
    plan.report_s = 5;
    plan.seed = 1;
    plan.fill_size = ~0ull; /* not given */
    plan.ws = ~0ull;
    while (*text) {
        const char *end = text;
        const char *value = 0;

        while (*end && *end != ' ' && *end != '\n' && *end != '\t') {
            if (*end == '=' && !value)
                value = end + 1;
            end++;
        }
        if (value && !option(text, (u64)(value - 1 - text), value, (u64)(end - value))) {
            struct line l = {0};

            line_text(&l, "bad option: ");
            while (text < end && l.length < 100)
                l.text[l.length++] = *text++;
            l.text[l.length] = 0;
            fail(AMIG_ERROR_OPTION, l.text);
            return;
        }
        text = *end ? end + 1 : end;
    }
    if (plan.workload == AMIG_WORK_FILL && plan.fill == AMIG_FILL_NONE)
        plan.fill = AMIG_FILL_RANDOM;
    if (plan.rate && plan.rate < AMIG_PAGE_SIZE)
        plan.rate = AMIG_PAGE_SIZE;
}
