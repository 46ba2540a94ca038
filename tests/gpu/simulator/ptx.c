/*
 * PTX to C: each kernel becomes a function that runs one thread from its start, or from where it waited last, to its
 * end or the next wait. Modules are compiled by gcc and kept in a folder by a hash of their C text.
 *
 * Kernels that never wait for other threads (no bar, shfl, vote, redux) have registers in local variables. In others
 * each thread has a struct of registers and a place to go on at: `return` and `switch` do what a coroutine would.
 * Threads of a warp run until each of them waits or has ended; then those that wait for their warp go on, and when no
 * thread of the block can go on any more, those at the barrier do.
 *
 * Covered is what XLA's own emitters and simple Triton kernels use. A kernel with anything else is refused by the name
 * of that instruction; the others of its module run.
 *
 * Environment: SIMULATOR_CACHE, the folder for compiled modules (/tmp/simulator-cache-UID).
 */
#define _GNU_SOURCE
#include "ptx.h"
#include "thread.h"

#include <ctype.h>
#include <dlfcn.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static const char prelude[] = {
#include "prelude.inc"
    , 0};

/* ---------------------------------------------------------------- text */

struct text {
  char *at;
  size_t size, room;
};

__attribute__((format(printf, 2, 3))) static void add(struct text *text, const char *format, ...) {
  va_list list;
  va_start(list, format);
  int more = vsnprintf(NULL, 0, format, list);
  va_end(list);
  if (text->size + (size_t)more + 1 > text->room) {
    text->room = 2 * (text->size + (size_t)more + 1);
    text->at = realloc(text->at, text->room);
  }
  va_start(list, format);
  vsnprintf(text->at + text->size, (size_t)more + 1, format, list);
  va_end(list);
  text->size += (size_t)more;
}

/* A string that lives until the translation is over (`pool_clear`). */
static __thread char *pool[1 << 16];
static __thread unsigned pool_size;

__attribute__((format(printf, 1, 2))) static char *form(const char *format, ...) {
  char *made = NULL;
  va_list list;
  va_start(list, format);
  if (vasprintf(&made, format, list) < 0) abort();
  va_end(list);
  if (pool_size < sizeof pool / sizeof *pool) pool[pool_size++] = made; /* beyond that they leak */
  return made;
}

static void pool_clear(void) {
  while (pool_size) free(pool[--pool_size]);
}

/* ---------------------------------------------------------------- modules */

/* ARGUMENT: of a function, by its place; CALL: what is passed to one, in a variable of its own. */
enum space { GLOBAL, SHARED, LOCAL, PARAMETER, ARGUMENT, CALL };

struct symbol {
  char *name;
  enum space space;
  size_t offset; /* GLOBAL: index */
  size_t size;
};

/* A kernel, or a function that kernels call. */
struct kernel {
  struct ptx_kernel public;
  bool is_function;
  size_t argument_count;
  char **callees;
  size_t callee_count;
  struct ptx_module *module;
  bool waits;
  unsigned waits_count;
  size_t parameters_size, local_size, static_shared;
  struct symbol *symbols; /* parameters, local and shared variables */
  size_t symbol_count;
  size_t *parameter_offsets, *parameter_sizes;
  size_t parameter_count;
  struct text registers; /* their declarations */
  char **names;          /* of registers */
  size_t name_count;
  struct text code;
  int (*run)(const void *env, const uint32_t tid[3], void *thread, void *warp);
  size_t thread_size;
};

struct ptx_module {
  struct ptx_host host;
  struct kernel **kernels;
  size_t kernel_count;
  struct symbol *symbols; /* global variables, shared ones of the module */
  size_t symbol_count;
  uint64_t *globals;
  size_t global_count;
  size_t shared_size;
};

static void add_symbol(struct symbol **symbols, size_t *count, struct symbol symbol) {
  *symbols = realloc(*symbols, (*count + 1) * sizeof **symbols);
  (*symbols)[(*count)++] = symbol;
}

static const struct symbol *find_symbol(const struct kernel *kernel, const char *name) {
  for (size_t i = 0; i < kernel->symbol_count; i++)
    if (strcmp(kernel->symbols[i].name, name) == 0) return &kernel->symbols[i];
  for (size_t i = 0; i < kernel->module->symbol_count; i++)
    if (strcmp(kernel->module->symbols[i].name, name) == 0) return &kernel->module->symbols[i];
  return NULL;
}

/* ---------------------------------------------------------------- types */

struct type {
  const char *name;
  unsigned bytes;
  char kind; /* u, s, f, h (computed with as float), b, p */
};
static const struct type types[] = {
    {"pred", 1, 'p'},   {"b8", 1, 'b'},     {"b16", 2, 'b'},    {"b32", 4, 'b'}, {"b64", 8, 'b'}, {"u8", 1, 'u'},
    {"u16", 2, 'u'},    {"u32", 4, 'u'},    {"u64", 8, 'u'},    {"s8", 1, 's'},  {"s16", 2, 's'}, {"s32", 4, 's'},
    {"s64", 8, 's'},    {"f16", 2, 'h'},    {"bf16", 2, 'h'},   {"f32", 4, 'f'}, {"f64", 8, 'f'}, {"f16x2", 4, 'x'},
    {"bf16x2", 4, 'x'}, {"e4m3x2", 2, 'e'}, {"e5m2x2", 2, 'e'},
};

static const struct type *find_type(const char *name) {
  for (size_t i = 0; i < sizeof types / sizeof *types; i++)
    if (strcmp(types[i].name, name) == 0) return &types[i];
  return NULL;
}

static bool is_float(const struct type *type) { return type->kind == 'f' || type->kind == 'h'; }

/* ---------------------------------------------------------------- a statement */

struct statement {
  char *guard; /* a condition, or NULL */
  char *parts[16];
  int part_count;
  char *operands[32];
  int operand_count;
  const struct type *types[4];
  int type_count;
};

static bool has(const struct statement *s, const char *part) {
  for (int i = 1; i < s->part_count; i++)
    if (strcmp(s->parts[i], part) == 0) return true;
  return false;
}

/* Splits at `separator` outside brackets; pieces lie in `text`, which is changed. */
static int split(char *text, char separator, char **pieces, int room) {
  int count = 0, depth = 0;
  if (!*text) return 0;
  pieces[count++] = text;
  for (; *text; text++) {
    if (strchr("{[(", *text)) depth++;
    if (strchr("}])", *text)) depth--;
    if (*text == separator && depth == 0) {
      *text = 0;
      if (count == room) return -1;
      pieces[count++] = text + 1;
    }
  }
  return count;
}

static char *without_spaces(const char *text) {
  char *made = form("%s", text), *to = made;
  for (const char *from = made; *from; from++)
    if (!isspace((unsigned char)*from)) *to++ = *from;
  *to = 0;
  return made;
}

/* ---------------------------------------------------------------- operands */

static __thread char *refusal; /* why this kernel cannot be translated */
#define REFUSE(...)                            \
  do {                                         \
    if (!refusal) refusal = form(__VA_ARGS__); \
    return "0";                                \
  } while (0)

static const char *special(const char *name) {
  static const char *const vectors[] = {"tid", "ntid", "ctaid", "nctaid"};
  static const char *const from[] = {"tid", "e->ntid", "e->ctaid", "e->nctaid"};
  for (int i = 0; i < 4; i++) {
    size_t length = strlen(vectors[i]);
    if (strncmp(name, vectors[i], length) == 0 && name[length] == '.' && strchr("xyz", name[length + 1]))
      return form("%s[%d]", from[i], name[length + 1] - 'x');
  }
  if (strcmp(name, "laneid") == 0) return "(flat & 31)";
  if (strcmp(name, "warpid") == 0) return "(flat >> 5)";
  if (strcmp(name, "nwarpid") == 0) return "((e->ntid[0] * e->ntid[1] * e->ntid[2] + 31) / 32)";
  if (strcmp(name, "smid") == 0 || strncmp(name, "cluster_cta", 11) == 0 || strncmp(name, "clusterid", 9) == 0)
    return "0";
  if (strncmp(name, "cluster_ncta", 12) == 0) return "1";
  if (strncmp(name, "clock", 5) == 0 || strncmp(name, "globaltimer", 11) == 0) return "nanoseconds()";
  if (strcmp(name, "dynamic_smem_size") == 0) return "e->dynamic_shared";
  if (strcmp(name, "lanemask_lt") == 0) return "((1u << (flat & 31)) - 1)";
  if (strcmp(name, "lanemask_eq") == 0) return "(1u << (flat & 31))";
  return NULL;
}

static bool is_register(const struct kernel *k, const char *name) {
  if (*name == '%') return true;
  for (size_t i = 0; i < k->name_count; i++)
    if (strcmp(k->names[i], name) == 0) return true;
  return false;
}

static const char *symbol_address(const struct symbol *symbol) {
  return symbol->space == GLOBAL ? form("e->globals[%zu]", symbol->offset) : form("%zuull", symbol->offset);
}

/* The bits of an operand. */
static const char *value(const struct kernel *k, const char *text, const struct type *type) {
  if (*text == '!') return form("!%s", value(k, text + 1, type));
  if (*text == '%') {
    const char *known = special(text + 1);
    if (known) return known;
    if (strchr(text, '.')) REFUSE("register %s", text);
    return form("R(r_%s)", text + 1);
  }
  if (text[0] == '0' && (text[1] == 'f' || text[1] == 'F') && strlen(text) == 10)
    return type && type->bytes == 8 ? form("set_f64(get_f32(0x%su))", text + 2) : form("0x%su", text + 2);
  if (text[0] == '0' && (text[1] == 'd' || text[1] == 'D')) return form("0x%sull", text + 2);
  if (isdigit((unsigned char)*text) || *text == '-' || *text == '+') {
    if (strchr(text, '.'))
      return type && type->bytes == 8 ? form("set_f64(%s)", text) : form("set_f32((float)%s)", text);
    char *end;
    unsigned long long number = *text == '-' ? (unsigned long long)strtoll(text, &end, 0) : strtoull(text, &end, 0);
    return form("%lluull", number);
  }
  if (strcmp(text, "WARP_SZ") == 0) return "32";
  if (is_register(k, text)) return form("R(r_%s)", text);
  char *name = form("%s", text), *plus = strchr(name, '+');
  if (plus) *plus++ = 0;
  const struct symbol *symbol = find_symbol(k, name);
  if (!symbol) REFUSE("operand %s", text);
  return form("(%s + %s)", symbol_address(symbol), plus ? plus : "0");
}

static const char *get(const struct kernel *k, const char *text, const struct type *type) {
  return form("get_%s(%s)", type->name, value(k, text, type));
}

static const char *target(const struct kernel *k, const char *text) {
  if (*text == '%') return form("R(r_%s)", text + 1);
  if (is_register(k, text)) return form("R(r_%s)", text);
  REFUSE("target %s", text);
}

/* A C expression of type char * for "[...]" in a space. */
static const char *address(const struct kernel *k, const char *text, const char *space) {
  if (*text != '[') REFUSE("address %s", text);
  char *inside = form("%.*s", (int)strlen(text) - 2, text + 1);
  char *at = inside + 1;
  while (*at && *at != '+' && *at != '-') at++;
  char sign = *at;
  long long offset = 0;
  if (sign) {
    *at = 0;
    offset = strtoll(at + 1, NULL, 0);
    if (sign == '-') offset = -offset;
  }
  const struct symbol *symbol = is_register(k, inside) ? NULL : find_symbol(k, inside);
  const char *base = symbol && symbol->space >= PARAMETER ? "0" : value(k, inside, NULL);
  if (strncmp(space, "param", 5) == 0) {
    if (symbol && symbol->space == ARGUMENT) return form("(a_%zu + %lld)", symbol->offset, offset);
    if (symbol && symbol->space == CALL) return form("(c_%s + %lld)", symbol->name, offset);
    if (!symbol || symbol->space != PARAMETER) REFUSE("parameter %s", text);
    return form("(e->parameters + %zu + %lld)", symbol->offset, offset);
  }
  if (strncmp(space, "shared", 6) == 0) return form("(e->shared + (uint32_t)(%s + %lldll))", base, offset);
  if (strcmp(space, "local") == 0) return form("(local + (uint32_t)(%s + %lldll))", base, offset);
  return form("global(e, %s + %lldll)", base, offset);
}

static const char *space_of(const struct statement *s) {
  static const char *const known[] = {"param", "shared", "local", "global", "const"};
  for (int i = 1; i < s->part_count; i++)
    for (size_t j = 0; j < sizeof known / sizeof *known; j++) {
      size_t length = strlen(known[j]);
      if (strncmp(s->parts[i], known[j], length) == 0 && (s->parts[i][length] == 0 || s->parts[i][length] == ':'))
        return known[j];
    }
  return "generic";
}

static const char *unsigned_of(unsigned bytes) { return form("uint%u_t", 8 * bytes); }
static const char *c_type(const struct type *type) {
  return form("%sint%u_t", type->kind == 's' ? "" : "u", 8 * type->bytes);
}

/* ---------------------------------------------------------------- instructions */

static const char *binary_float(const struct statement *s, const char *sign, const struct type *type, const char *a,
                                const char *b) {
  const char *result = form("(%s %s %s)", a, sign, b);
  if (type->kind == 'f' && type->bytes == 4) {
    const char *way = has(s, "rm") ? "down" : has(s, "rp") ? "up" : has(s, "rz") ? "zero" : NULL;
    if (way) result = form("%s_f32((double)%s %s (double)%s)", way, a, sign, b);
  }
  return has(s, "sat") ? form("saturate(%s)", result) : result;
}

static const char *fma_of(const struct statement *s, const struct type *type, const char *a, const char *b,
                          const char *c) {
  const char *result = type->bytes == 8 ? form("fma(%s, %s, %s)", a, b, c) : form("fmaf(%s, %s, %s)", a, b, c);
  const char *way = has(s, "rm") ? "down" : has(s, "rp") ? "up" : has(s, "rz") ? "zero" : NULL;
  if (way && type->bytes == 4) result = form("%s_f32((double)%s * (double)%s + (double)%s)", way, a, b, c);
  if (has(s, "relu")) result = form("fmax(%s, 0)", result);
  return has(s, "sat") ? form("saturate(%s)", result) : result;
}

/* Of half floats in pairs: the same instruction for each half. */
static const struct type *half_of(const struct type *type) { return find_type(type->name[0] == 'b' ? "bf16" : "f16"); }
static const char *half(const struct kernel *k, const char *text, const struct type *pair, int which) {
  return form("get_%s((uint16_t)(%s >> %d))", half_of(pair)->name, value(k, text, pair), 16 * which);
}

/* A result of one instruction as bits, or NULL if it is not of this kind. */
static const char *arithmetic(const struct kernel *k, const struct statement *s, const struct type *t) {
  const char *op = s->parts[0];
  char *const *o = s->operands;
  int n = s->operand_count;
  unsigned bits = 8 * t->bytes;
  const char *a = n > 1 ? get(k, o[1], t) : "0", *b = NULL, *c = NULL;
  bool is_shift = strcmp(op, "shl") == 0 || strcmp(op, "shr") == 0;
  if (n > 2) b = is_shift ? value(k, o[2], find_type("u32")) : get(k, o[2], t);
  if (n > 3) c = get(k, o[3], t);
#define IS(name) (strcmp(op, name) == 0)
#define SET(...) form("set_%s(%s)", t->name, form(__VA_ARGS__))
  if (t->kind == 'x') {
    const char *halves[2];
    for (int i = 0; i < 2; i++) {
      const char *ha = half(k, o[1], t, i), *hb = n > 2 ? half(k, o[2], t, i) : "0",
                 *hc = n > 3 ? half(k, o[3], t, i) : "0";
      const char *result;
      if (IS("add"))
        result = form("%s + %s", ha, hb);
      else if (IS("sub"))
        result = form("%s - %s", ha, hb);
      else if (IS("mul"))
        result = form("%s * %s", ha, hb);
      else if (IS("fma"))
        result = form("fmaf(%s, %s, %s)", ha, hb, hc);
      else if (IS("neg"))
        result = form("-%s", ha);
      else if (IS("abs"))
        result = form("fabsf(%s)", ha);
      else if (IS("max"))
        result = form("%s(%s, %s)", has(s, "NaN") ? "max_nan" : "fmax", ha, hb);
      else if (IS("min"))
        result = form("%s(%s, %s)", has(s, "NaN") ? "min_nan" : "fmin", ha, hb);
      else
        return NULL;
      halves[i] = form("(uint32_t)set_%s(%s)", half_of(t)->name, result);
    }
    return form("(%s | %s << 16)", halves[0], halves[1]);
  }
  if (is_float(t)) {
    if (IS("add")) return SET("%s", binary_float(s, "+", t, a, b));
    if (IS("sub")) return SET("%s", binary_float(s, "-", t, a, b));
    if (IS("mul")) return SET("%s", binary_float(s, "*", t, a, b));
    if (IS("div")) return SET("%s", binary_float(s, "/", t, a, b));
    if (IS("fma") || IS("mad")) return SET("%s", fma_of(s, t, a, b, c));
    if (IS("neg")) return form("(%s ^ (1ull << %u))", value(k, o[1], t), bits - 1);
    if (IS("abs")) return form("(%s & ~(1ull << %u))", value(k, o[1], t), bits - 1);
    if (IS("max")) return SET("%s(%s, %s)", has(s, "NaN") ? "max_nan" : "fmax", a, b);
    if (IS("min")) return SET("%s(%s, %s)", has(s, "NaN") ? "min_nan" : "fmin", a, b);
    if (IS("copysign")) return SET("copysign(%s, %s)", b, a);
    if (t->bytes == 8) {
      if (IS("sqrt")) return SET("sqrt(%s)", a);
      if (IS("rsqrt")) return SET("1 / sqrt(%s)", a);
      if (IS("rcp")) return SET("1 / %s", a);
    } else {
      if (IS("sqrt")) return SET("sqrtf(%s)", a);
      if (IS("rsqrt")) return SET("1 / sqrtf(%s)", a);
      if (IS("rcp")) return SET("1 / %s", a);
      if (IS("sin")) return SET("sinf(%s)", a);
      if (IS("cos")) return SET("cosf(%s)", a);
      if (IS("ex2")) return SET("exp2f(%s)", a);
      if (IS("lg2")) return SET("log2f(%s)", a);
      if (IS("tanh")) return SET("tanhf(%s)", a);
    }
    return NULL;
  }
  bool carry_in = strcmp(op, "addc") == 0 || strcmp(op, "subc") == 0 || strcmp(op, "madc") == 0;
  if (has(s, "cc") || carry_in) {
    const char *base;
    a = form("(u128)%s", form("(%s)%s", unsigned_of(t->bytes), a));
    b = form("(u128)%s", form("(%s)%s", unsigned_of(t->bytes), b));
    if (IS("add") || IS("addc"))
      base = form("%s + %s", a, b);
    else if (IS("sub") || IS("subc"))
      base = form("%s - %s", a, b);
    else if ((IS("mad") || IS("madc")) && has(s, "lo"))
      base = form("(u128)(%s)(%s * %s) + (%s)%s", unsigned_of(t->bytes), a, b, unsigned_of(t->bytes), c);
    else if ((IS("mad") || IS("madc")) && has(s, "hi") && t->kind == 'u')
      base = form("((%s * %s) >> %u) + (%s)%s", a, b, bits, unsigned_of(t->bytes), c);
    else
      return NULL;
    const char *carried = carry_in ? form("%s %c R(carry)", base, IS("subc") ? '-' : '+') : base;
    return has(s, "cc") ? form("({ u128 x_ = %s; R(carry) = x_ >> %u & 1; (uint64_t)x_; })", carried, bits)
                        : form("(uint64_t)(%s)", carried);
  }
  bool wide = has(s, "wide"), high = has(s, "hi");
  const char *big =
      t->kind == 's' ? (wide && bits < 64 ? "int64_t" : "s128") : (wide && bits < 64 ? "uint64_t" : "u128");
  const char *product = !b     ? ""
                        : wide ? form("(uint64_t)((%s)%s * %s)", big, a, b)
                        : high ? form("(%s)(((%s)%s * %s) >> %u)", unsigned_of(t->bytes), big, a, b, bits)
                               : form("((uint64_t)%s * (uint64_t)%s)", a, b);
  if (IS("add")) {
    if (has(s, "sat")) return NULL;
    return SET("(uint64_t)%s + (uint64_t)%s", a, b);
  }
  if (IS("sub")) return has(s, "sat") ? NULL : SET("(uint64_t)%s - (uint64_t)%s", a, b);
  if (IS("mul") || IS("mul24")) return wide ? product : SET("%s", product);
  if (IS("mad") || IS("mad24")) {
    const struct type *result = wide ? find_type(form("%c%u", t->kind, 2 * bits)) : t;
    return form("set_%s((uint64_t)%s + (uint64_t)%s)", result->name, product, get(k, o[3], result));
  }
  if (IS("div"))
    return SET("(%s ? (%s)(%s / %s) : -1)", b, c_type(find_type("s64")), t->kind == 's' ? form("(s128)%s", a) : a, b);
  if (IS("rem"))
    return SET("(%s ? (%s)(%s %% %s) : -1)", b, c_type(find_type("s64")), t->kind == 's' ? form("(s128)%s", a) : a, b);
  if (IS("neg")) return SET("-(uint64_t)%s", a);
  if (IS("abs")) return SET("(%s < 0 ? -(uint64_t)%s : (uint64_t)%s)", a, a, a);
  if (IS("min")) return SET("(%s < %s ? %s : %s)", a, b, a, b);
  if (IS("max")) return SET("(%s > %s ? %s : %s)", a, b, a, b);
  if (IS("sad")) return SET("%s + (%s > %s ? %s - %s : %s - %s)", c, a, b, a, b, b, a);
  if (IS("and")) return SET("%s & %s", a, b);
  if (IS("or")) return SET("%s | %s", a, b);
  if (IS("xor")) return SET("%s ^ %s", a, b);
  if (IS("not")) return t->kind == 'p' ? SET("!%s", a) : SET("~%s", a);
  if (IS("cnot")) return SET("%s == 0", a);
  if (IS("shl")) return SET("shift_left(%s, %s, %u)", a, b, bits);
  if (IS("shr")) return SET("shift_%s(%s, %s, %u)", t->kind == 's' ? "signed" : "right", a, b, bits);
  if (IS("shf")) {
    const char *both = form("((uint64_t)%s << 32 | %s)", b, a);
    const char *by = has(s, "wrap") ? form("(%s & 31)", c) : form("(%s < 32 ? %s : 32)", c, c);
    return has(s, "l") ? form("(uint32_t)((u128)%s << %s >> 32)", both, by) : form("(uint32_t)(%s >> %s)", both, by);
  }
  if (IS("prmt") && s->part_count == 2) return form("prmt(%s, %s, %s)", a, b, c);
  if (IS("lop3") && n == 5) return form("lop3(%s, %s, %s, %s)", a, b, c, value(k, o[4], NULL));
  if (IS("popc")) return form("__builtin_popcountll(%s)", a);
  if (IS("clz")) return form("(%s ? __builtin_clzll(%s) - %u : %u)", a, a, 64 - bits, bits);
  if (IS("brev")) return form("reverse(%s, %u)", a, bits);
  if (IS("bfe"))
    return form("field((%s)%s, %s, %s, %d, %u)", unsigned_of(t->bytes), a, value(k, o[2], NULL), value(k, o[3], NULL),
                t->kind == 's', bits);
  if (IS("bfi")) return form("insert(%s, %s, %s, %s, %u)", a, b, value(k, o[3], NULL), value(k, o[4], NULL), bits);
  if (IS("bfind")) {
    const char *x = t->kind == 's' ? form("(%s < 0 ? ~%s : %s)", a, a, a) : a;
    const char *place = form("(%s ? 63 - __builtin_clzll((%s)%s) : -1)", x, unsigned_of(t->bytes), x);
    return has(s, "shiftamt") ? form("(%s < 0 ? -1 : %u - %s)", place, bits - 1, place) : place;
  }
  return NULL;
}

static const char *comparison(const struct kernel *k, const struct statement *s, const struct type *t) {
  static const struct {
    const char *name, *sign;
    bool unordered;
  } known[] = {{"eq", "==", false}, {"ne", "!=", false}, {"lt", "<", false},  {"le", "<=", false},
               {"gt", ">", false},  {"ge", ">=", false}, {"lo", "<", false},  {"ls", "<=", false},
               {"hi", ">", false},  {"hs", ">=", false}, {"equ", "==", true}, {"neu", "!=", true},
               {"ltu", "<", true},  {"leu", "<=", true}, {"gtu", ">", true},  {"geu", ">=", true}};
  const char *a = get(k, s->operands[1], t), *b = get(k, s->operands[2], t);
  const char *nan = form("(%s != %s || %s != %s)", a, a, b, b);
  const char *name = s->parts[1];
  if (strcmp(name, "nan") == 0) return nan;
  if (strcmp(name, "num") == 0) return form("!%s", nan);
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    if (strcmp(known[i].name, name) != 0) continue;
    const char *plain = form("(%s %s %s)", a, known[i].sign, b);
    if (!is_float(t)) return plain;
    if (known[i].unordered) return form("(%s || %s)", nan, plain);
    return strcmp(name, "ne") == 0 ? form("(!%s && %s)", nan, plain) : plain;
  }
  REFUSE("comparison %s", name);
}

static const char *conversion(const struct kernel *k, const struct statement *s) {
  const struct type *to = s->types[0], *from = s->types[1];
  if (s->type_count != 2) REFUSE("cvt with %d types", s->type_count);
  if (from->kind == 'e' || to->kind == 'e') {
    /* 8-bit floats come in pairs, and so do their halves. */
    const char *eight = from->kind == 'e' ? from->name : to->name;
    int mantissa = eight[1] == '4' ? 3 : 2;
    if (from->kind == 'e' && strcmp(to->name, "f16x2") == 0) {
      const char *a = value(k, s->operands[1], from);
      return form("((uint32_t)set_f16(get_f8(%s >> 8, %d)) << 16 | set_f16(get_f8(%s, %d)))", a, mantissa, a, mantissa);
    }
    if (from->kind == 'f')
      return form("(set_f8(%s, %d) << 8 | set_f8(%s, %d))", get(k, s->operands[1], from), mantissa,
                  get(k, s->operands[2], from), mantissa);
    if (strcmp(from->name, "f16x2") == 0)
      return form("(set_f8(%s, %d) << 8 | set_f8(%s, %d))", half(k, s->operands[1], from, 1), mantissa,
                  half(k, s->operands[1], from, 0), mantissa);
    REFUSE("cvt of %s", eight);
  }
  if (to->kind == 'x') {
    const struct type *part = half_of(to);
    const char *high = get(k, s->operands[1], from), *low = get(k, s->operands[2], from);
    if (has(s, "relu")) high = form("fmax(%s, 0)", high), low = form("fmax(%s, 0)", low);
    return form("((uint32_t)set_%s(%s) << 16 | set_%s(%s))", part->name, high, part->name, low);
  }
  const char *a = get(k, s->operands[1], from);
  const char *round = has(s, "rni")   ? "nearbyint"
                      : has(s, "rzi") ? "trunc"
                      : has(s, "rmi") ? "floor"
                      : has(s, "rpi") ? "ceil"
                                      : NULL;
  if (is_float(from)) {
    if (round) a = form("%s(%s)", round, a);
    if (!is_float(to)) return form("set_%s(to_%s(%s))", to->name, c_type(to), a);
    if (to->bytes == 4 && from->bytes == 8 && !round) {
      const char *way = has(s, "rm") ? "down" : has(s, "rp") ? "up" : has(s, "rz") ? "zero" : NULL;
      if (way) a = form("%s_f32(%s)", way, a);
    }
    if (has(s, "relu")) a = form("fmax(%s, 0)", a);
    if (has(s, "sat")) a = form("saturate(%s)", a);
  } else if (!is_float(to) && has(s, "sat")) {
    /* Exact for all but 64 bits. */
    return form("set_%s(to_%s((double)%s))", to->name, c_type(to), a);
  }
  return form("set_%s(%s)", to->name, a);
}

static const char *atomic_result(const struct statement *s, const struct type *t, const char *old, const char *b,
                                 const char *c) {
  if (has(s, "add")) return is_float(t) ? form("%s + %s", old, b) : form("(uint64_t)%s + (uint64_t)%s", old, b);
  if (has(s, "exch")) return b;
  if (has(s, "cas")) return form("(%s == %s ? %s : %s)", old, b, c, old);
  if (has(s, "min")) return is_float(t) ? form("fmin(%s, %s)", old, b) : form("(%s < %s ? %s : %s)", old, b, old, b);
  if (has(s, "max")) return is_float(t) ? form("fmax(%s, %s)", old, b) : form("(%s > %s ? %s : %s)", old, b, old, b);
  if (has(s, "and")) return form("%s & %s", old, b);
  if (has(s, "or")) return form("%s | %s", old, b);
  if (has(s, "xor")) return form("%s ^ %s", old, b);
  if (has(s, "inc")) return form("(%s >= %s ? 0 : %s + 1)", old, b, old);
  if (has(s, "dec")) return form("(%s == 0 || %s > %s ? %s : %s - 1)", old, old, b, b, old);
  REFUSE("atomic operation");
}

/* Waits for the other threads, of the warp or the block. */
static const char *wait_here(struct kernel *k, const char *what) {
  unsigned place = ++k->waits_count;
  return form("R(place) = %u; return %s; case %u:;", place, what, place);
}

/* Shows `what` to the warp. Two sets of values take turns, since no thread can be two waits ahead. */
static const char *show(struct kernel *k, const char *what) {
  return form("R(turn) ^= 1; w->value[R(turn)][flat & 31] = %s; %s", what, wait_here(k, "WARP"));
}

static const char *loop_over_warp(const char *start, const char *step, const char *mask) {
  return form(
      "({ uint32_t mask_ = %s; uint64_t x_ = %s; for (int i_ = 0; i_ < 32; i_++) if (mask_ >> i_ & 1 && "
      "i_ < (int)live) { uint64_t v_ = w->value[R(turn)][i_]; %s } x_; })",
      mask, start, step);
}

/* call.uni (result), function, (arguments) */
static const char *call_of(struct kernel *k, struct statement *s) {
  char *const *o = s->operands;
  bool with_result = s->operand_count > 1 && *o[0] == '(';
  const char *name = o[with_result];
  if (s->operand_count > with_result + 2 || !isalpha((unsigned char)*name)) REFUSE("call %s", name);
  struct text all = {0};
  add(&all, "f_%s(e, tid, flat, all, live", name);
  for (int i = 0; i < s->operand_count; i++) {
    if (*o[i] != '(') continue;
    char *parts[64];
    int count = split(form("%.*s", (int)strlen(o[i]) - 2, o[i] + 1), ',', parts, 64);
    for (int j = 0; j < count; j++) add(&all, ", c_%s", parts[j]);
  }
  add(&all, ");");
  const char *result = form("%s", all.at);
  free(all.at);
  k->callees = realloc(k->callees, (k->callee_count + 1) * sizeof *k->callees);
  k->callees[k->callee_count++] = strdup(name);
  return result;
}

/* C text of an instruction. */
static const char *instruction(struct kernel *k, struct statement *s) {
  const char *op = s->parts[0];
  char *const *o = s->operands;
  const struct type *t = s->type_count ? s->types[0] : NULL;
  int n = s->operand_count;

  if (IS("griddepcontrol") || IS("fence") || IS("membar") || IS("nanosleep") || IS("prefetch") || IS("prefetchu") ||
      IS("discard") || IS("applypriority"))
    return ";";
  if (IS("ret") || IS("exit")) return "return DONE;";
  if (IS("trap")) return "abort();";
  if (IS("bra")) return form("goto L_%s;", o[0]);
  if (IS("call")) return call_of(k, s);

  if (IS("mov")) {
    if (!t) REFUSE("mov without a type");
    if (*o[0] == '{' || *o[1] == '{') {
      bool unpack = *o[0] == '{';
      char *inside = form("%.*s", (int)strlen(o[!unpack]) - 2, o[!unpack] + 1), *parts[8];
      int count = split(inside, ',', parts, 8);
      unsigned bits = 8 * t->bytes / (unsigned)count;
      const struct type *part = find_type(form("b%u", bits));
      if (!part) REFUSE("mov in %d parts", count);
      struct text all = {0};
      add(&all, "{ uint64_t x_ = %s;", unpack ? value(k, o[1], t) : "0");
      for (int i = 0; i < count; i++) {
        if (strcmp(parts[i], "_") == 0) continue;
        if (unpack)
          add(&all, " %s = get_%s(x_ >> %u);", target(k, parts[i]), part->name, bits * (unsigned)i);
        else
          add(&all, " x_ |= (uint64_t)get_%s(%s) << %u;", part->name, value(k, parts[i], part), bits * (unsigned)i);
      }
      if (!unpack) add(&all, " %s = x_;", target(k, o[0]));
      add(&all, " }");
      const char *result = form("%s", all.at);
      free(all.at);
      return result;
    }
    return form("%s = %s;", target(k, o[0]), value(k, o[1], t));
  }

  if (IS("ld") || IS("ldu") || IS("st")) {
    if (!t) REFUSE("%s without a type", op);
    bool load = !IS("st");
    const char *at = address(k, o[load], space_of(s));
    const char *list = o[!load];
    char *parts[16] = {form("%s", list)};
    int count = 1;
    if (*list == '{') count = split(form("%.*s", (int)strlen(list) - 2, list + 1), ',', parts, 16);
    struct text all = {0};
    add(&all, "{ char *p_ = (char *)%s;", at);
    for (int i = 0; i < count; i++) {
      if (strcmp(parts[i], "_") == 0) continue;
      if (load)
        add(&all, " %s = LOAD(%s, p_ + %u);", target(k, parts[i]), c_type(t), t->bytes * (unsigned)i);
      else
        add(&all, " STORE(%s, p_ + %u, %s);", unsigned_of(t->bytes), t->bytes * (unsigned)i, value(k, parts[i], t));
    }
    add(&all, " }");
    const char *result = form("%s", all.at);
    free(all.at);
    return result;
  }

  if (IS("cvta")) {
    const char *space = space_of(s), *from = value(k, o[1], t);
    const char *base = strcmp(space, "shared") == 0  ? "(uint64_t)e->shared"
                       : strcmp(space, "local") == 0 ? "(uint64_t)local"
                       : strcmp(space, "param") == 0 ? "(uint64_t)e->parameters"
                                                     : "0";
    return form("%s = %s %c %s;", target(k, o[0]), from, has(s, "to") ? '-' : '+', base);
  }
  if (IS("cvt")) return form("%s = %s;", target(k, o[0]), conversion(k, s));

  if (IS("setp")) {
    const char *condition = comparison(k, s, t);
    char *second = strchr(o[0], '|'), *first = form("%.*s", (int)(second ? second - o[0] : (long)strlen(o[0])), o[0]);
    const char *extra = n > 3 ? value(k, o[3], NULL) : NULL;
    const char *join = has(s, "and") ? "&" : has(s, "or") ? "|" : has(s, "xor") ? "^" : NULL;
    if (extra && !join) REFUSE("setp with a third operand");
    const char *yes = extra ? form("(x_ %s %s)", join, extra) : "x_";
    const char *no = extra ? form("(!x_ %s %s)", join, extra) : "!x_";
    const char *both = second && strcmp(second + 1, "_") != 0 ? form("uint8_t n_ = %s;", no) : "";
    return form("{ uint8_t x_ = %s; uint8_t y_ = %s; %s %s%s }", condition, yes, both,
                strcmp(first, "_") == 0 ? "" : form("%s = y_;", target(k, first)),
                *both ? form(" %s = n_;", target(k, second + 1)) : "");
  }
  if (IS("set")) {
    const struct type *from = s->types[1];
    const char *condition = comparison(k, s, from);
    return form("%s = %s ? %s : 0;", target(k, o[0]), condition, is_float(t) ? form("set_%s(1)", t->name) : "-1");
  }
  if (IS("selp"))
    return form("%s = %s ? %s : %s;", target(k, o[0]), value(k, o[3], NULL), value(k, o[1], t), value(k, o[2], t));
  if (IS("slct"))
    return form("%s = %s >= 0 ? %s : %s;", target(k, o[0]), get(k, o[3], s->types[1]), value(k, o[1], t),
                value(k, o[2], t));
  if (IS("testp")) {
    const char *a = get(k, o[1], t);
    const char *test = has(s, "finite")       ? "isfinite"
                       : has(s, "infinite")   ? "isinf"
                       : has(s, "notanumber") ? "isnan"
                       : has(s, "normal")     ? "isnormal"
                                              : NULL;
    if (has(s, "number")) return form("%s = !isnan(%s);", target(k, o[0]), a);
    if (!test) REFUSE("testp");
    return form("%s = !!%s(%s);", target(k, o[0]), test, a);
  }

  if (IS("bar") || IS("barrier")) {
    if (has(s, "warp")) return wait_here(k, "WARP");
    if (has(s, "cluster")) return has(s, "wait") ? wait_here(k, "BARRIER") : ";";
    if (!has(s, "sync") && !has(s, "arrive")) REFUSE("%s.%s", op, s->part_count > 1 ? s->parts[1] : "");
    if (n > 0 && strcmp(o[0], "0") != 0) REFUSE("barrier number %s", o[0]);
    return wait_here(k, "BARRIER");
  }
  if (IS("shfl")) {
    char *second = strchr(o[0], '|'), *first = form("%.*s", (int)(second ? second - o[0] : (long)strlen(o[0])), o[0]);
    char mode = has(s, "up") ? 'u' : has(s, "down") ? 'd' : has(s, "bfly") ? 'b' : 'i';
    return form(
        "%s { int j_ = shuffle_lane('%c', flat & 31, %s, %s); int ok_ = j_ >= 0; if (!ok_) j_ = flat & 31; %s = "
        "(uint32_t)w->value[R(turn)][j_]; %s }",
        show(k, value(k, o[1], t)), mode, value(k, o[2], NULL), value(k, o[3], NULL), target(k, first),
        second ? form("%s = ok_;", target(k, second + 1)) : "");
  }
  if (IS("vote")) {
    const char *what = value(k, o[1], NULL), *mask = n > 2 ? value(k, o[2], NULL) : "-1";
    const char *result = has(s, "ballot") ? loop_over_warp("0", "x_ |= (v_ & 1) << i_;", mask)
                         : has(s, "any")  ? loop_over_warp("0", "x_ |= v_ & 1;", mask)
                         : has(s, "all")  ? loop_over_warp("1", "x_ &= v_ & 1;", mask)
                                          : NULL;
    if (!result) REFUSE("vote");
    return form("%s %s = %s;", show(k, form("!!%s", what)), target(k, o[0]), result);
  }
  if (IS("redux") && t && t->bytes == 4 && !is_float(t)) {
    const char *mask = n > 2 ? value(k, o[2], NULL) : "-1";
    const char *step = has(s, "add")   ? "x_ += v_;"
                       : has(s, "or")  ? "x_ |= v_;"
                       : has(s, "xor") ? "x_ ^= v_;"
                       : has(s, "and") ? "x_ &= v_;"
                       : has(s, "min") ? form("if (get_%s(v_) < get_%s(x_)) x_ = v_;", t->name, t->name)
                                       : form("if (get_%s(v_) > get_%s(x_)) x_ = v_;", t->name, t->name);
    const char *start = has(s, "add") || has(s, "or") || has(s, "xor") ? "0"
                        : has(s, "and")                                ? "-1"
                                                                       : "w->value[R(turn)][__builtin_ctz(mask_)]";
    return form("%s %s = %s;", show(k, value(k, o[1], t)), target(k, o[0]), loop_over_warp(start, step, mask));
  }
  if ((IS("ldmatrix") || IS("stmatrix")) && has(s, "m8n8") && t && t->bytes == 2) {
    /* Matrices of 8 x 8: lane 8 j + r has the address of row r of matrix j, and each lane two elements of a row (or,
       transposed, of a column) of each. */
    bool load = IS("ldmatrix");
    const char *list = o[!load];
    char *parts[4] = {form("%s", list)};
    int count = 1;
    if (*list == '{') count = split(form("%.*s", (int)strlen(list) - 2, list + 1), ',', parts, 4);
    struct text all = {0};
    add(&all, "%s {", show(k, form("(uint64_t)%s", address(k, o[load], "shared"))));
    for (int j = 0; j < count; j++) {
      add(&all, " {");
      for (int half_ = 0; half_ < 2; half_++) {
        const char *across = form("(2 * (flat & 3) + %d)", half_), *down = "(flat >> 2 & 7)";
        add(&all, " uint16_t *p%d_ = (uint16_t *)w->value[R(turn)][8 * %d + %s] + %s;", half_, j,
            has(s, "trans") ? across : down, has(s, "trans") ? down : across);
      }
      if (load)
        add(&all, " %s = *p0_ | (uint32_t)*p1_ << 16; }", target(k, parts[j]));
      else
        add(&all, " uint32_t x_ = %s; *p0_ = x_; *p1_ = x_ >> 16; }", value(k, parts[j], find_type("b32")));
    }
    /* Nobody writes on before all have read. */
    add(&all, " } %s", wait_here(k, "WARP"));
    const char *result = form("%s", all.at);
    free(all.at);
    return result;
  }
  if (IS("activemask")) return form("%s = live == 32 ? -1 : (1u << live) - 1;", target(k, o[0]));
  if (IS("elect")) {
    char *second = strchr(o[0], '|');
    if (!second) REFUSE("elect");
    return form("%s = (flat & 31) == 0;", target(k, second + 1));
  }

  if (IS("atom") || IS("red")) {
    bool with_result = IS("atom");
    if (!t || t->kind == 'x' || has(s, "v2") || has(s, "v4")) REFUSE("%s of vectors", op);
    const char *at = address(k, o[with_result], space_of(s));
    const char *b = get(k, o[1 + with_result], t), *c = n > 2 + with_result ? get(k, o[2 + with_result], t) : NULL;
    const char *raw = unsigned_of(t->bytes);
    const char *result = atomic_result(s, t, form("get_%s(old_)", t->name), b, c);
    return form(
        "{ %s *p_ = (void *)%s, old_ = __atomic_load_n(p_, 5), new_; do new_ = set_%s(%s); while "
        "(!__atomic_compare_exchange_n(p_, &old_, new_, 0, 5, 5)); %s }",
        raw, at, t->name, result, with_result ? form("%s = old_;", target(k, o[0])) : "");
  }
  if (IS("cp") && has(s, "async") && (has(s, "ca") || has(s, "cg"))) {
    long size = strtol(o[2], NULL, 0);
    const char *really = n > 3 ? value(k, o[3], NULL) : form("%ld", size);
    return form("{ char *to_ = (char *)%s; uint32_t n_ = %s; memset(to_, 0, %ld); memcpy(to_, %s, n_); }",
                address(k, o[0], "shared"), really, size, address(k, o[1], "global"));
  }
  if (IS("cp") && has(s, "async") && (has(s, "commit_group") || has(s, "wait_group") || has(s, "wait_all"))) return ";";

  const char *result = t && n > 1 ? arithmetic(k, s, t) : NULL;
  if (!result) {
    struct text full = {0};
    for (int i = 0; i < s->part_count; i++) add(&full, "%s%s", i ? "." : "", s->parts[i]);
    const char *name = form("%s", full.at);
    free(full.at);
    REFUSE("instruction %s", name);
  }
  return form("%s = %s;", target(k, o[0]), result);
}

/* ---------------------------------------------------------------- parsing */

static size_t align_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

static const char *skip_space(const char *at) {
  while (isspace((unsigned char)*at)) at++;
  return at;
}

/* ".align 16 .b8 name[64]": alignment, type, name, bytes. */
static bool declared(const char *text, size_t *alignment, char **name, size_t *size) {
  *alignment = 0;
  unsigned bytes = 0, vector = 1;
  text = skip_space(text);
  while (*text == '.') {
    const char *end = text + 1;
    while (isalnum((unsigned char)*end) || *end == '_') end++;
    char *word = form("%.*s", (int)(end - text - 1), text + 1);
    text = skip_space(end);
    const struct type *type = find_type(word);
    if (strcmp(word, "align") == 0) {
      char *after;
      *alignment = strtoul(text, &after, 10);
      text = skip_space(after);
    } else if (strcmp(word, "ptr") == 0) {
      continue;
    } else if (strcmp(word, "v2") == 0 || strcmp(word, "v4") == 0) {
      vector = (unsigned)(word[1] - '0');
    } else if (type) {
      bytes = type->bytes;
    }
  }
  /* ".ptr .align 16" says what a pointer points to. */
  const char *end = text;
  while (isalnum((unsigned char)*end) || strchr("_$%", *end)) {
    if (!*end) break;
    end++;
  }
  if (end == text || !bytes) return false;
  *name = form("%.*s", (int)(end - text), text);
  size_t count = 1;
  if (*skip_space(end) == '[') count = strtoul(skip_space(end) + 1, NULL, 10);
  *size = bytes * vector * count;
  if (!*alignment) *alignment = bytes * vector;
  return true;
}

static void parse_parameters(struct kernel *k, char *list) {
  char *pieces[4096];
  int count = split(list, ',', pieces, 4096);
  for (int i = 0; i < count; i++) {
    char *text = strstr(pieces[i], ".param"), *name;
    if (!text) continue;
    text += 6;
    size_t alignment, size;
    if (strstr(text, ".ptr")) {
      /* Its alignment is not the parameter's. */
      char *last = text + strlen(text);
      while (last > text && isspace((unsigned char)last[-1])) *--last = 0;
      while (last > text && !isspace((unsigned char)last[-1])) last--;
      text = form(".b64 %s", last);
    }
    if (!declared(text, &alignment, &name, &size)) {
      if (!refusal) refusal = form("parameter %s", pieces[i]);
      return;
    }
    k->parameters_size = align_up(k->parameters_size, alignment);
    add_symbol(&k->symbols, &k->symbol_count, (struct symbol){strdup(name), PARAMETER, k->parameters_size, size});
    k->parameter_offsets = realloc(k->parameter_offsets, (k->parameter_count + 1) * sizeof(size_t));
    k->parameter_sizes = realloc(k->parameter_sizes, (k->parameter_count + 1) * sizeof(size_t));
    k->parameter_offsets[k->parameter_count] = k->parameters_size;
    k->parameter_sizes[k->parameter_count++] = size;
    k->parameters_size += size;
  }
}

static void parse_registers(struct kernel *k, const char *text) {
  text = skip_space(text);
  const char *end = text + 1;
  while (isalnum((unsigned char)*end)) end++;
  const struct type *type = find_type(form("%.*s", (int)(end - text - 1), text + 1));
  if (!type) {
    if (!refusal) refusal = form("registers %s", text);
    return;
  }
  char *list = without_spaces(end), *pieces[256];
  int count = split(list, ',', pieces, 256);
  for (int i = 0; i < count; i++) {
    char *name = pieces[i] + (*pieces[i] == '%'), *range = strchr(name, '<');
    int many = 1;
    if (range) {
      many = atoi(range + 1);
      *range = 0;
    }
    for (int j = 0; j < many; j++) {
      char *full = range ? form("%s%d", name, j) : form("%s", name);
      bool known = false;
      if (!range)
        for (size_t m = 0; m < k->name_count; m++) known |= strcmp(k->names[m], full) == 0;
      if (known) continue;
      if (!range) {
        k->names = realloc(k->names, (k->name_count + 1) * sizeof *k->names);
        k->names[k->name_count++] = full;
      }
      add(&k->registers, "  %s r_%s;\n", unsigned_of(type->bytes), full);
    }
  }
}

static void parse_variable(struct kernel *k, const char *text, enum space space) {
  size_t alignment, size;
  char *name;
  size_t *used = space == SHARED ? &k->static_shared : &k->local_size;
  if (!declared(text, &alignment, &name, &size)) {
    if (!refusal) refusal = form("variable %s", text);
    return;
  }
  *used = align_up(*used, alignment);
  add_symbol(&k->symbols, &k->symbol_count, (struct symbol){strdup(name), space, *used, size});
  *used += size;
}

/* What is passed to a function; the same names come again at each call. */
static void parse_call_variable(struct kernel *k, const char *text) {
  size_t alignment, size;
  char *name;
  if (!declared(text, &alignment, &name, &size)) {
    if (!refusal) refusal = form("variable %s", text);
    return;
  }
  for (size_t i = 0; i < k->symbol_count; i++)
    if (k->symbols[i].space == CALL && strcmp(k->symbols[i].name, name) == 0) {
      if (k->symbols[i].size < size) k->symbols[i].size = size;
      return;
    }
  add_symbol(&k->symbols, &k->symbol_count, (struct symbol){strdup(name), CALL, 0, size});
}

static void parse_instruction(struct kernel *k, const char *text) {
  struct statement s = {0};
  text = skip_space(text);
  if (*text == '@') {
    const char *end = text + 1;
    while (!isspace((unsigned char)*end)) end++;
    s.guard = form("%.*s", (int)(end - text - 1), text + 1);
    text = skip_space(end);
  }
  const char *end = text;
  while (*end && !isspace((unsigned char)*end)) end++;
  char *name = form("%.*s", (int)(end - text), text);
  s.part_count = split(name, '.', s.parts, 16);
  s.operand_count = split(without_spaces(end), ',', s.operands, 32);
  if (s.part_count < 1 || s.operand_count < 0) {
    if (!refusal) refusal = form("statement %s", text);
    return;
  }
  for (int i = 1; i < s.part_count && s.type_count < 4; i++) {
    const struct type *type = find_type(s.parts[i]);
    if (type) s.types[s.type_count++] = type;
  }
  const char *code = instruction(k, &s);
  if (s.guard)
    add(&k->code, "  if (%s) { %s }\n", value(k, s.guard, NULL), code);
  else
    add(&k->code, "  %s\n", code);
}

/* Two passes: declarations first. */
static void parse_body(struct kernel *k, const char *text, bool declarations) {
  for (text = skip_space(text); *text; text = skip_space(text)) {
    if (*text == '{' || *text == '}') {
      text++;
      continue;
    }
    const char *end = text;
    while (isalnum((unsigned char)*end) || *end == '_' || *end == '$') end++;
    if (*end == ':' && end > text && end[1] != ':') {
      if (!declarations) add(&k->code, " L_%.*s:;\n", (int)(end - text), text);
      text = end + 1;
      continue;
    }
    end = strchr(text, ';');
    if (!end) break;
    char *statement = form("%.*s", (int)(end - text), text);
    text = end + 1;
    if (*statement == '.') {
      if (!declarations) continue;
      if (strncmp(statement, ".reg", 4) == 0)
        parse_registers(k, statement + 4);
      else if (strncmp(statement, ".shared", 7) == 0)
        parse_variable(k, statement + 7, SHARED);
      else if (strncmp(statement, ".local", 6) == 0)
        parse_variable(k, statement + 6, LOCAL);
      else if (strncmp(statement, ".param", 6) == 0)
        parse_call_variable(k, statement + 6);
      else if (strncmp(statement, ".pragma", 7) != 0 && !refusal)
        refusal = form("directive %s", statement);
      continue;
    }
    if (!declarations) parse_instruction(k, statement);
  }
}

static void parse_global(struct ptx_module *module, const char *text) {
  size_t alignment, size;
  char *name;
  text += 1 + strcspn(text + 1, " \t");
  if (!declared(text, &alignment, &name, &size)) return;
  unsigned char *content = calloc(size ? size : 1, 1);
  const char *values = strchr(text, '=');
  if (values) {
    /* Bytes; wider elements take their size. */
    unsigned width = strstr(text, ".b8") || strstr(text, ".u8") || strstr(text, ".s8")      ? 1
                     : strstr(text, "16") && strstr(text, "b16")                            ? 2
                     : strstr(text, ".b64") || strstr(text, ".u64") || strstr(text, ".f64") ? 8
                                                                                            : 4;
    size_t at = 0;
    for (const char *p = values + 1; *p && at + width <= size;) {
      while (*p && !isdigit((unsigned char)*p) && *p != '-') p++;
      if (!*p) break;
      char *after;
      unsigned long long number;
      if (p[0] == '0' && (p[1] == 'f' || p[1] == 'd'))
        number = strtoull(p + 2, &after, 16);
      else
        number = *p == '-' ? (unsigned long long)strtoll(p, &after, 0) : strtoull(p, &after, 0);
      memcpy(content + at, &number, width);
      at += width;
      p = after;
    }
  }
  module->globals = realloc(module->globals, (module->global_count + 1) * sizeof *module->globals);
  module->globals[module->global_count] = module->host.allocate(module->host.user, name, size, values ? content : NULL);
  free(content);
  add_symbol(&module->symbols, &module->symbol_count,
             (struct symbol){strdup(name), GLOBAL, module->global_count++, size});
}

/* A function's arguments, or its result: up to ')'. */
static void parse_arguments(struct kernel *k, const char *list) {
  char *pieces[256];
  int count = split(form("%.*s", (int)strcspn(list, ")"), list), ',', pieces, 256);
  for (int i = 0; i < count; i++) {
    char *text = strstr(pieces[i], ".param"), *name;
    size_t alignment, size;
    if (!text) continue;
    if (!declared(text + 6, &alignment, &name, &size)) {
      if (!refusal) refusal = form("argument %s", pieces[i]);
      return;
    }
    add_symbol(&k->symbols, &k->symbol_count, (struct symbol){strdup(name), ARGUMENT, k->argument_count++, size});
  }
}

static struct kernel *parse_kernel(struct ptx_module *module, const char *head, const char *body) {
  struct kernel *k = calloc(1, sizeof *k);
  refusal = NULL;
  k->module = module;
  k->is_function = !strstr(head, ".entry");
  const char *name = skip_space(k->is_function ? strstr(head, ".func") + 5 : strstr(head, ".entry") + 6);
  if (k->is_function && *name == '(') {
    parse_arguments(k, name + 1);
    name = skip_space(name + strcspn(name, ")") + 1);
  }
  const char *end = name;
  while (isalnum((unsigned char)*end) || *end == '_' || *end == '$') end++;
  k->public.name = strndup(name, (size_t)(end - name));
  if (*skip_space(end) == '(') {
    const char *list = skip_space(end) + 1;
    if (k->is_function)
      parse_arguments(k, list);
    else
      parse_parameters(k, form("%.*s", (int)strcspn(list, ")"), list));
  }
  static const char *const waiting[] = {"bar.", "barrier.", "shfl.", "vote.", "redux.", "ldmatrix.", "stmatrix."};
  for (size_t i = 0; i < sizeof waiting / sizeof *waiting; i++) k->waits |= strstr(body, waiting[i]) != NULL;
  parse_body(k, body, true);
  /* Dynamic shared memory comes after all of the block's own. */
  k->static_shared = align_up(k->static_shared, 128);
  for (size_t i = 0; i < module->symbol_count; i++)
    if (module->symbols[i].space == SHARED)
      add_symbol(&k->symbols, &k->symbol_count,
                 (struct symbol){
                     strdup(module->symbols[i].name), SHARED,
                     k->static_shared + (module->symbols[i].size ? module->symbols[i].offset : module->shared_size),
                     module->symbols[i].size});
  k->static_shared += module->shared_size;
  parse_body(k, body, false);
  if (k->is_function && k->waits && !refusal) refusal = form("a function that waits");
  k->public.shared_size = k->static_shared;
  if (refusal) k->public.why = strdup(refusal);
  return k;
}

/* Without comments, and without lines about sources. */
static char *cleaned(const char *text) {
  char *made = malloc(strlen(text) + 2), *to = made;
  for (const char *p = text; *p;) {
    if (p[0] == '/' && p[1] == '/') {
      p += strcspn(p, "\n");
    } else if (p[0] == '/' && p[1] == '*') {
      const char *end = strstr(p + 2, "*/");
      p = end ? end + 2 : p + strlen(p);
    } else if (strncmp(p, ".loc", 4) == 0 && isspace((unsigned char)p[4])) {
      p += strcspn(p, "\n");
    } else if (strncmp(p, ".file", 5) == 0) {
      p += strcspn(p, "\n");
    } else {
      *to++ = *p++;
    }
  }
  *to = 0;
  return made;
}

static void parse_module(struct ptx_module *module, const char *text) {
  while (*(text = skip_space(text))) {
    /* Up to ';', or to the braces of a body. */
    const char *end = text;
    bool initialised = false;
    while (*end && *end != ';' && (*end != '{' || initialised)) initialised |= *end++ == '=';
    char *head = form("%.*s", (int)(end - text), text);
    if (*end == '{') {
      const char *start = end + 1;
      int depth = 1;
      for (end++; *end && depth; end++) depth += *end == '{' ? 1 : *end == '}' ? -1 : 0;
      if (strstr(head, ".entry") || strstr(head, ".func")) {
        char *body = form("%.*s", (int)(end - start - 1), start);
        module->kernels = realloc(module->kernels, (module->kernel_count + 1) * sizeof *module->kernels);
        module->kernels[module->kernel_count] = parse_kernel(module, head, body);
        module->kernel_count++;
      }
      text = end;
      continue;
    }
    const char *at;
    if (strstr(head, ".func")) {
      /* A declaration. */
    } else if ((at = strstr(head, ".global")) || (at = strstr(head, ".const"))) {
      parse_global(module, at);
    } else if ((at = strstr(head, ".shared"))) {
      size_t alignment, size;
      char *name;
      if (declared(at + 7, &alignment, &name, &size)) {
        module->shared_size = align_up(module->shared_size, alignment > 16 ? alignment : 16);
        add_symbol(&module->symbols, &module->symbol_count,
                   (struct symbol){strdup(name), SHARED, module->shared_size, size});
        module->shared_size += size;
      }
    }
    text = *end ? end + 1 : end;
  }
  module->shared_size = align_up(module->shared_size, 128);
}

/* ---------------------------------------------------------------- C, compiled */

/* Who calls what is refused is refused. */
static void refuse_callers(struct ptx_module *module) {
  for (bool again = true; again;) {
    again = false;
    for (size_t i = 0; i < module->kernel_count; i++) {
      struct kernel *k = module->kernels[i];
      for (size_t j = 0; j < k->callee_count && !k->public.why; j++) {
        const struct ptx_kernel *callee = ptx_find(module, k->callees[j]);
        if (callee && !callee->why) continue;
        char why[256];
        snprintf(why, sizeof why, "function %s: %s", k->callees[j], callee ? callee->why : "not defined");
        k->public.why = strdup(why);
        again = true;
      }
    }
  }
}

static void write_prototype(struct text *c, const struct kernel *k) {
  add(c, "static int f_%s(const struct env *e, const uint32_t tid[3], uint32_t flat, uint32_t all, uint32_t live",
      k->public.name);
  for (size_t i = 0; i < k->argument_count; i++) add(c, ", char *a_%zu", i);
  add(c, ")");
}

static void write_call_variables(struct text *c, const struct kernel *k) {
  for (size_t i = 0; i < k->symbol_count; i++)
    if (k->symbols[i].space == CALL)
      add(c, "  char c_%s[%zu] __attribute__((aligned(16)));\n", k->symbols[i].name, k->symbols[i].size);
}

static void write_kernel(struct text *c, const struct kernel *k, size_t number) {
  if (k->public.why) return;
  const char *registers = k->registers.at ? k->registers.at : "";
  add(c, "\n/* %s */\n", k->public.name);
  if (k->is_function) {
    write_prototype(c, k);
    add(c, " {\n#define R(x) x\n  char local[%zu] __attribute__((aligned(16)));\n  uint64_t carry;\n%s",
        k->local_size + 1, registers);
    write_call_variables(c, k);
    add(c, "%s  return DONE;\n#undef R\n}\n", k->code.at ? k->code.at : "");
    return;
  }
  if (k->waits)
    add(c,
        "struct thread_%zu {\n  uint32_t place, turn; uint64_t carry; char local[%zu] "
        "__attribute__((aligned(16)));\n%s};\n",
        number, k->local_size + 1, registers);
  add(c, "const unsigned size_%zu = %s;\n", number, k->waits ? form("sizeof(struct thread_%zu)", number) : "0");
  add(c, "int run_%zu(const struct env *e, const uint32_t tid[3], void *thread, struct warp *w) {\n", number);
  add(c, "  uint32_t flat = (tid[2] * e->ntid[1] + tid[1]) * e->ntid[0] + tid[0];\n");
  add(c,
      "  uint32_t all = e->ntid[0] * e->ntid[1] * e->ntid[2], first = flat & ~31u, live = all - first < 32 ? all - "
      "first : 32;\n");
  write_call_variables(c, k);
  if (k->waits)
    add(c,
        "#define R(x) t->x\n  struct thread_%zu *t = thread;\n  char *local = t->local;\n  switch (t->place) {\n  case "
        "0:;\n",
        number);
  else
    add(c, "#define R(x) x\n  char local[%zu] __attribute__((aligned(16)));\n  uint64_t carry;\n%s", k->local_size + 1,
        registers);
  add(c, "%s", k->code.at ? k->code.at : "");
  if (k->waits) add(c, "  }\n");
  add(c, "  return DONE;\n#undef R\n}\n");
}

/* The compiled module. NULL, and why. */
static void *compiled(const char *text, char *why, size_t why_size) {
  uint64_t hash = 14695981039346656037u;
  for (const char *p = text; *p; p++) hash = (hash ^ (unsigned char)*p) * 1099511628211u;
  char folder[256], source[320], library[320], temporary[320], log[330];
  const char *wanted = getenv("SIMULATOR_CACHE");
  if (wanted)
    snprintf(folder, sizeof folder, "%s", wanted);
  else
    snprintf(folder, sizeof folder, "/tmp/simulator-cache-%d", (int)getuid());
  mkdir(folder, 0700);
  snprintf(library, sizeof library, "%s/%016llx.so", folder, (unsigned long long)hash);
  if (access(library, R_OK) != 0) {
    snprintf(source, sizeof source, "%s/%016llx.%d.c", folder, (unsigned long long)hash, (int)getpid());
    snprintf(temporary, sizeof temporary, "%s/%016llx.%d.so", folder, (unsigned long long)hash, (int)getpid());
    snprintf(log, sizeof log, "%s.log", source);
    FILE *file = fopen(source, "w");
    if (!file) return snprintf(why, why_size, "cannot write %s", source), NULL;
    fputs(text, file);
    fclose(file);
    char *command = form(
        "exec gcc -std=gnu17 -O1 -w -march=native -fwrapv -fno-strict-aliasing -ffp-contract=off -fPIC -shared -o %s "
        "%s -lm >%s 2>&1",
        temporary, source, log);
    char *arguments[] = {"sh", "-c", command, NULL};
    pid_t child;
    int status = -1;
    if (posix_spawnp(&child, "sh", NULL, NULL, arguments, environ) != 0 || waitpid(child, &status, 0) != child ||
        status != 0)
      return snprintf(why, why_size, "gcc failed, see %s", log), NULL;
    unlink(log);
    if (!getenv("SIMULATOR_KEEP")) unlink(source);
    rename(temporary, library);
  }
  void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) snprintf(why, why_size, "%s", dlerror());
  return handle;
}

struct ptx_module *ptx_load(const char *text, const struct ptx_host *host, char *why, size_t why_size) {
  struct ptx_module *module = calloc(1, sizeof *module);
  module->host = *host;
  char *clean = cleaned(text);
  parse_module(module, clean);
  free(clean);
  struct text c = {0};
  add(&c, "%s", prelude);
  refuse_callers(module);
  for (size_t i = 0; i < module->kernel_count; i++) {
    if (!module->kernels[i]->is_function) continue;
    write_prototype(&c, module->kernels[i]);
    add(&c, ";\n");
  }
  for (size_t i = 0; i < module->kernel_count; i++) write_kernel(&c, module->kernels[i], i);
  void *handle = compiled(c.at, why, why_size);
  free(c.at);
  pool_clear();
  if (!handle) return NULL; /* What was parsed stays; this is rare. */
  for (size_t i = 0; i < module->kernel_count; i++) {
    struct kernel *k = module->kernels[i];
    char name[64];
    free(k->code.at);
    free(k->registers.at);
    if (k->public.why || k->is_function) continue;
    snprintf(name, sizeof name, "run_%zu", i);
    *(void **)&k->run = dlsym(handle, name);
    snprintf(name, sizeof name, "size_%zu", i);
    k->thread_size = *(const unsigned *)dlsym(handle, name);
  }
  return module;
}

const struct ptx_kernel *ptx_find(const struct ptx_module *module, const char *name) {
  for (size_t i = 0; i < module->kernel_count; i++)
    if (strcmp(module->kernels[i]->public.name, name) == 0) return &module->kernels[i]->public;
  return NULL;
}

/* ---------------------------------------------------------------- running */

struct launch {
  const struct kernel *kernel;
  struct env env;
  char parameters[];
};

struct launch *ptx_prepare(const struct ptx_kernel *kernel, const unsigned grid[3], const unsigned block[3],
                           size_t dynamic_shared, void **parameters, void **extra) {
  const struct kernel *k = (const struct kernel *)kernel;
  struct launch *launch = calloc(1, sizeof *launch + k->parameters_size + 16);
  launch->kernel = k;
  if (parameters) {
    for (size_t i = 0; i < k->parameter_count; i++)
      memcpy(launch->parameters + k->parameter_offsets[i], parameters[i], k->parameter_sizes[i]);
  } else if (extra) {
    const void *buffer = NULL;
    size_t size = 0;
    for (; *extra; extra += 2) {
      if (*extra == (void *)1) buffer = extra[1];
      if (*extra == (void *)2) size = *(size_t *)extra[1];
    }
    if (buffer) memcpy(launch->parameters, buffer, size < k->parameters_size ? size : k->parameters_size);
  } else if (k->parameter_count) {
    free(launch);
    return NULL;
  }
  const struct ptx_host *host = &k->module->host;
  launch->env = (struct env){.arena = host->arena,
                             .arena_size = host->arena_size,
                             .shadow = (uint64_t)host->shadow,
                             .globals = k->module->globals,
                             .parameters = launch->parameters,
                             .dynamic_shared = (uint32_t)dynamic_shared};
  for (int i = 0; i < 3; i++) {
    launch->env.nctaid[i] = grid[i];
    launch->env.ntid[i] = block[i];
  }
  return launch;
}

struct launch *ptx_copy(const struct launch *launch) {
  size_t size = sizeof *launch + launch->kernel->parameters_size + 16;
  struct launch *copy = memcpy(malloc(size), launch, size);
  copy->env.parameters = copy->parameters;
  return copy;
}

static void tid_of(const struct env *env, unsigned flat, uint32_t tid[3]) {
  tid[0] = flat % env->ntid[0];
  tid[1] = flat / env->ntid[0] % env->ntid[1];
  tid[2] = flat / env->ntid[0] / env->ntid[1];
}

/* A block whose threads wait for each other. */
static void run_waiting(const struct kernel *k, const struct env *env, unsigned threads, char *states, char *where,
                        struct warp *warps) {
  enum { READY = 3 };
  uint32_t tid[3];
  memset(where, READY, threads);
  for (unsigned i = 0; i < threads; i++) memset(states + i * k->thread_size, 0, 8); /* place, turn */
  for (;;) {
    for (unsigned first = 0; first < threads; first += 32) {
      unsigned end = first + 32 < threads ? first + 32 : threads;
      for (bool again = true; again;) {
        for (unsigned i = first; i < end; i++) {
          if (where[i] != READY) continue;
          tid_of(env, i, tid);
          where[i] = (char)k->run(env, tid, states + i * k->thread_size, &warps[first / 32]);
        }
        /* Those that wait for their warp at the earliest place go on together. */
        uint32_t place = UINT32_MAX;
        for (unsigned i = first; i < end; i++) {
          uint32_t own = *(uint32_t *)(states + i * k->thread_size);
          if (where[i] == WARP && own < place) place = own;
        }
        again = place != UINT32_MAX;
        for (unsigned i = first; again && i < end; i++)
          if (where[i] == WARP && *(uint32_t *)(states + i * k->thread_size) == place) where[i] = READY;
      }
    }
    bool any = false;
    for (unsigned i = 0; i < threads; i++)
      if (where[i] == BARRIER) where[i] = READY, any = true;
    if (!any) return;
  }
}

void ptx_run(struct launch *launch) {
  const struct kernel *k = launch->kernel;
  struct env *env = &launch->env;
  unsigned threads = env->ntid[0] * env->ntid[1] * env->ntid[2];
  env->shared = aligned_alloc(128, align_up(k->static_shared + env->dynamic_shared + 128, 128));
  char *states = k->waits ? aligned_alloc(16, align_up(k->thread_size * threads, 16)) : NULL;
  char *where = malloc(threads);
  struct warp *warps = calloc((threads + 31) / 32, sizeof *warps);
  for (env->ctaid[2] = 0; env->ctaid[2] < env->nctaid[2]; env->ctaid[2]++)
    for (env->ctaid[1] = 0; env->ctaid[1] < env->nctaid[1]; env->ctaid[1]++)
      for (env->ctaid[0] = 0; env->ctaid[0] < env->nctaid[0]; env->ctaid[0]++) {
        if (k->waits) {
          run_waiting(k, env, threads, states, where, warps);
          continue;
        }
        uint32_t tid[3];
        for (tid[2] = 0; tid[2] < env->ntid[2]; tid[2]++)
          for (tid[1] = 0; tid[1] < env->ntid[1]; tid[1]++)
            for (tid[0] = 0; tid[0] < env->ntid[0]; tid[0]++) k->run(env, tid, NULL, NULL);
      }
  free(env->shared);
  free(states);
  free(where);
  free(warps);
}
